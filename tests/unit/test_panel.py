"""Teachers: their placement, missing requirements, and when the run gives one up."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from lorapar_ray.config import LabelConfig, TeacherConfig
from lorapar_ray.config_file import load_config
from lorapar_ray.errors import UserError
from lorapar_ray.labeling.calibration import ask_probes
from lorapar_ray.labeling.hosted import deployment_options, teacher_engine_arguments
from lorapar_ray.labeling.panel import Failure, Panel
from lorapar_ray.labeling.secrets import secret
from lorapar_ray.labeling.store import VoteStore, question_key
from lorapar_ray.labeling.teachers import Asked, Refused, ShutOut, python_class
from lorapar_ray.pipeline import PIPELINE
from tests.unit.votes import answer, panel

QUICKSTART = Path(__file__).parents[2] / "jobs" / "configs" / "quickstart.yaml"


def test_placement_and_scaling_come_from_the_config() -> None:
    def teacher(**settings: Any) -> TeacherConfig:
        return TeacherConfig.model_validate({"name": "t", "model": "owner/name", **settings})

    plain = deployment_options(teacher(resources={"cpus": 2}))
    assert plain["num_replicas"] == 1 and plain["max_ongoing_requests"] == 96  # 1.5 times max_num_seqs
    assert plain["ray_actor_options"]["num_cpus"] == 2 and plain["ray_actor_options"]["num_gpus"] == 0
    scaled = deployment_options(teacher(replicas=2, max_replicas=5, engine={"max_num_seqs": 128}))
    assert scaled["autoscaling_config"] == {"min_replicas": 2, "max_replicas": 5, "target_ongoing_requests": 128}
    half = teacher(resources={"gpus": 0.5})
    assert teacher_engine_arguments(half, 0)["gpu_memory_utilization"] == 0.45
    own = teacher(resources={"gpus": 0.5}, engine={"extra": {"gpu_memory_utilization": 0.3}})
    assert teacher_engine_arguments(own, 0)["gpu_memory_utilization"] == 0.3
    wide = teacher(resources={"gpus": 4}, engine={"tensor_parallel": 4}, revision="v1")
    assert deployment_options(wide)["ray_actor_options"]["num_gpus"] == 4
    arguments = teacher_engine_arguments(wide, 0)
    assert (arguments["tensor_parallel_size"], arguments["revision"]) == (4, "v1")
    for gpus, ranks in ((1, 4), (0.5, 2), (2, 1)):
        with pytest.raises(ValidationError, match=r"resources\.gpus"):
            teacher(resources={"gpus": gpus}, engine={"tensor_parallel": ranks})
    with pytest.raises(ValidationError, match="max_replicas"):
        teacher(replicas=3, max_replicas=2)


def test_what_a_teacher_lacks_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="teacher 'a': class 'simulated:a' cannot be imported"):
        python_class(panel("a").teachers[0])
    monkeypatch.delenv("LORAPAR_NO_SUCH_KEY", raising=False)
    remote = {"name": "far", "kind": "remote", "model": "m", "base_url": "http://127.0.0.1:1"}
    teacher = TeacherConfig.model_validate({**remote, "api_key_env": "LORAPAR_NO_SUCH_KEY"})
    with pytest.raises(UserError, match="teacher 'far': environment variable LORAPAR_NO_SUCH_KEY is not set"):
        secret(teacher)
    monkeypatch.setenv("LORAPAR_NO_SUCH_KEY", "s3cret")
    assert secret(teacher) == "s3cret" and secret(TeacherConfig.model_validate(remote)) is None


class Moody:
    """Fault injection: fails in the way that its name says."""

    def __init__(self, teacher: TeacherConfig) -> None:
        self._name = teacher.name

    async def ask(self, prompt: str, choices: list[str]) -> Asked:
        if self._name == "well":
            return Asked([-0.1, -2.0], 7, 0.01)
        raise {"picky": Refused, "locked": ShutOut, "down": ConnectionError}[self._name](f"{self._name}!")


def test_a_teacher_is_given_up_for_its_own_failures_and_not_for_the_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    names, slept = ("well", "picky", "locked", "down"), []
    teachers = [{"name": name, "kind": "python", "model": f"{__name__}:Moody"} for name in names]
    label = LabelConfig.model_validate({"teachers": teachers, "give_up_after": 3, "retries": 2, "quorum": 3})

    async def no_sleep(seconds: float) -> None:
        slept.append(seconds)

    async def ask_all() -> Panel:
        asked = Panel(label, {}, {}, "student")
        for question in range(5):
            for teacher in label.teachers:
                found = await asked.ask(teacher, f"q{question}", "1")
                assert isinstance(found, list) == (teacher.name == "well")
        return asked

    monkeypatch.setattr("lorapar_ray.labeling.panel.asyncio.sleep", no_sleep)
    asked = asyncio.run(ask_all())
    assert set(asked.dead) == {"locked", "down"} and asked.quorum_lost
    assert asked.dead["down"] == "3 failures in a row, the last: ConnectionError: down!"
    assert slept == [1.0, 2.0] * 3  # only temporary errors are retried, and nothing after it is given up


def test_an_invalid_answer_is_requested_again_and_then_abstains() -> None:
    teachers = [{"name": name, "kind": "python", "model": f"{__name__}:Moody"} for name in ("well", "down")]
    label = LabelConfig.model_validate({"teachers": teachers, "retries": 2, "backoff_s": 0.001})
    times = []

    class OneShort(Moody):
        async def ask(self, prompt: str, choices: list[str]) -> Asked:
            times.append(prompt)
            return Asked([-0.1], 7, 0.01)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(f"{__name__}.Moody", OneShort)
        found = asyncio.run(Panel(label, {}, {}, "student").ask(label.teachers[0], "q", "1"))
    assert (
        isinstance(found, Failure)
        and found.reason == "ValueError: 1 log-probabilities for 2 choices"
        and not found.by_question
    )
    assert len(times) == 3


def test_a_probe_that_a_teacher_refused_before_does_not_silence_it(tmp_path: Path) -> None:
    teachers = [{"name": name, "kind": "python", "model": f"{__name__}:Moody"} for name in ("well", "down")]
    label = LabelConfig.model_validate({"teachers": teachers, "retries": 0})
    keys, store = {"well": [b"w"], "down": [b"d"]}, VoteStore(tmp_path / "votes.sqlite")
    probes = [("long", "1"), ("short", "1")]
    store.add((question_key("short", "1"), key, answer(1.0)) for key in (b"w", b"d"))

    class RefusesLong(Moody):
        async def ask(self, prompt: str, choices: list[str]) -> Asked:
            if "Question: long" in prompt:
                raise Refused("too long")
            return await super().ask(prompt, choices)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(f"{__name__}.Moody", RefusesLong)
        silent = asyncio.run(ask_probes(Panel(label, {}, {}, "s"), label, keys, store, probes, []))
    assert list(silent) == ["down"]


def test_dry_run_shows_what_each_teacher_requests() -> None:
    config = load_config(QUICKSTART)
    teachers = [
        {"name": "big", "model": "o/n", "max_replicas": 4, "engine": {"tensor_parallel": 2}, "resources": {"gpus": 2}},
        {"name": "far", "kind": "remote", "model": "m", "base_url": "http://host/v1", "requests_per_second": 5},
        {"name": "own", "kind": "python", "model": "module:Class"},
    ]
    label = LabelConfig.model_validate({"teachers": teachers, "workers": 2})
    said = PIPELINE["label"].resources(config.model_copy(update={"label": label}))
    assert said == (
        "1 to 4 × big (1 CPU + 2 GPU, tensor parallel 2, 96 requests), "
        "far (remote, completions at http://host/v1, at most 5 requests/s), "
        "own (module:Class, in the asking worker), 2 × asking worker (0.5 CPU), 128 questions in flight"
    )
