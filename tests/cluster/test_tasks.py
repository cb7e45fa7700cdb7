"""Work that runs once, as a task on some machine: a process that is lost is replaced, but not without end."""

import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import ray

from lorapar_ray import cluster_check
from lorapar_ray.cluster_check import examine_cluster
from lorapar_ray.config import Config
from lorapar_ray.errors import UserError
from lorapar_ray.pipeline import check, check_there
from lorapar_ray.workers import TASK_TRIES, on_a_worker, where_models_are
from tests.tiny_run import save_tiny_student, tiny_config

pytestmark = pytest.mark.cluster


def dies_once(folder: str) -> str:
    """Ends its process the first time."""
    mark = Path(folder) / "began"
    if not mark.exists():
        mark.touch()
        os._exit(1)
    return "done"


def dies(folder: str) -> None:
    """Ends its process every time."""
    Path(folder, str(os.getpid())).touch()
    os._exit(1)


def refuses() -> None:
    raise UserError("x: no such thing")


def test_a_task_survives_a_lost_process_and_gives_up_after_some(cluster: None, tmp_path: Path) -> None:
    once, always = tmp_path / "once", tmp_path / "always"
    once.mkdir()
    always.mkdir()
    assert on_a_worker(dies_once, str(once)) == "done"
    with pytest.raises(ray.exceptions.WorkerCrashedError):
        on_a_worker(dies, str(always))
    assert len(list(always.iterdir())) == TASK_TRIES
    with pytest.raises(UserError, match=r"^x: no such thing$"):
        on_a_worker(refuses)


def test_models_are_looked_at_here_on_a_ray_of_our_own_and_by_a_task_on_another(
    cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert where_models_are(os.getpid) == os.getpid()
    monkeypatch.setattr("lorapar_ray.workers.is_own_ray", lambda: False)
    assert where_models_are(os.getpid) != os.getpid()


def test_the_driver_needs_no_student_to_check_a_run(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(save_tiny_student(tmp_path / "student"))
    config["grpo"] |= {"learners": 3, "sequence_parallel": 3}
    loaded = Config.model_validate(config)

    def missing(path: str) -> str:
        raise UserError(f"model '{path}': no such directory")

    monkeypatch.setattr("lorapar_ray.models.resolve_model", missing)  # in this process alone
    check(loaded, ("grpo",))
    with pytest.raises(UserError, match=r"3 learners cannot divide the model's \d attention heads"):
        check_there(loaded, ("sft", "grpo"))


def test_trackers_are_looked_for_where_the_workers_run(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process W&B is installed and has a key; on the node, whose Ray started without, it is not."""
    monkeypatch.setattr("lorapar_ray.tracking.find_spec", lambda name: object())
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    plain = tiny_config(tmp_path)
    address = ray.nodes()[0]["NodeManagerAddress"]
    lack = f"wandb is not installed; pip install wandb where Ray starts on {address}; or remove wandb from the list"

    def config_of(**parts: dict[str, Any]) -> Config:
        return Config.model_validate(plain | {name: plain[name] | part for name, part in parts.items()})

    for stage in ("sft", "grpo"):
        loaded = config_of(**{stage: {"report_to": ["tensorboard", "wandb"]}})
        check(loaded, ("score", "sft", "grpo"))
        with pytest.raises(UserError, match=f"^{re.escape(f'{stage}.report_to: {lack}')}$"):
            check_there(loaded, ("score", "sft", "grpo"))
        found = examine_cluster(loaded, None)
        assert [each.detail for each in found if each.what == "trackers"] == [f"{stage}.report_to: {lack}"]
    far = {"learner_resources": {"nodes": {"group": "elsewhere"}}, "report_to": ["wandb"]}
    check_there(config_of(grpo=far), ("score", "sft", "grpo"))  # no node that it may come to has joined yet
    check_there(config_of(sft={"report_to": ["tensorboard"]}), ("score", "sft", "grpo"))


def test_a_node_that_cannot_report_says_why(cluster: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A node without our package, and one whose torch cannot be loaded (fault injection)."""
    plain = tiny_config(save_tiny_student(tmp_path))
    given = plain | {"adapter": {"init": "adapter", "path": str(tmp_path / "none")}}
    missing = (
        f"adapter.path '{tmp_path}/none': needs adapter_config.json and adapter_model.safetensors, as PEFT saves them"
    )
    for fields, wrong in ((plain, []), (given, [missing])):
        found = examine_cluster(Config.model_validate(fields), str(tmp_path / "run"))
        assert found[0].detail.startswith("1 answer, ")
        assert [each.detail.partition(": ")[2] for each in found if not each.ok] == wrong
    elsewhere = ModuleType("only_here")
    exec("def report(*_): return {}", elsewhere.__dict__)
    monkeypatch.setitem(sys.modules, "only_here", elsewhere)

    def broken(*_: Any) -> None:
        raise OSError("libcudart.so.13: cannot open shared object file")

    for report, why in (
        (elsewhere.report, "ModuleNotFoundError: No module named 'only_here'"),
        (broken, "OSError: libcudart.so.13: cannot open shared object file"),
    ):
        monkeypatch.setattr(cluster_check, "report", report)
        [(node, said)] = cluster_check._ask({each["NodeID"]: each for each in ray.nodes()}, None, [], None)[1].items()
        assert said == why, node
