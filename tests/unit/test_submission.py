"""Submitting a run to a cluster: errors before anything is sent, and how nodes that differ are named."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from click.testing import Result
from typer.testing import CliRunner

from lorapar_ray import submission
from lorapar_ray.capacity import Capacity
from lorapar_ray.cli import app
from lorapar_ray.cluster_check import (
    SILENT,
    NodeReport,
    _gpus,
    _keys,
    _models_found,
    _nodes,
    _room,
    _storage,
    _versions,
)
from lorapar_ray.config import Config
from lorapar_ray.errors import UserError
from lorapar_ray.redact import remember
from lorapar_ray.storage.probe import Probe
from lorapar_ray.submission import (
    Jobs,
    Submission,
    _attempts,
    in_working_dir,
    require_no_secret,
    require_whole_path,
)
from lorapar_ray.versions import installed_versions

HANDED = Submission("x", "/shared/runs/x", ("--config", "a b.yaml"), Path())
NODES = {name: {"NodeManagerAddress": f"10.0.0.{place}", "Resources": {"CPU": 4}} for place, name in enumerate("ab")}


def report(**changes: Any) -> NodeReport:
    plain = {"versions": installed_versions(), "gpus": 0, "installed": 0, "storage": "", "free_gib": 9.0, "models": {}}
    return NodeReport(**{**plain, **changes})


def config_of(**parts: Any) -> Config:
    remote = {"kind": "remote", "name": "t", "model": "m", "base_url": "https://x.org", "api_key_env": "A_KEY"}
    source = {"reader": "file", "path": "rows.jsonl"}
    label = {"teachers": [remote], "quorum": 1}
    return Config.model_validate(
        {"name": "x", "model": {"path": "m"}, "data": {"train": [source]}, "label": label, **parts}
    )


def test_one_run_directory_has_one_row_of_jobs() -> None:
    assert HANDED.key == Submission("x", "/shared/runs/x", (), Path("/elsewhere")).key
    assert HANDED.key != Submission("x", "/shared/runs/y", (), Path()).key
    key = HANDED.key
    others = [f"{key}-check", f"{key}-check-2", f"{key}9", "4711", "2", "-2", ""]
    assert _attempts(key, [key, f"{key}-2", *others]) == [key, f"{key}-2"]
    assert HANDED.command("run").endswith("run --config 'a b.yaml' --run-dir /shared/runs/x")


def test_a_config_outside_of_what_is_sent_is_refused(tmp_path: Path) -> None:
    inside = tmp_path / "work" / "configs" / "run.yaml"
    inside.parent.mkdir(parents=True)
    assert in_working_dir(inside, tmp_path / "work") == (tmp_path / "work", Path("configs/run.yaml"))
    with pytest.raises(UserError, match="lies outside the working directory"):
        in_working_dir(tmp_path / "run.yaml", tmp_path / "work")
    with pytest.raises(UserError, match="no such directory"):
        in_working_dir(inside, tmp_path / "none")


def test_a_run_directory_in_the_job_s_own_is_refused() -> None:
    require_whole_path("/shared/runs/x")
    require_whole_path("s3://bucket/runs/x")
    with pytest.raises(UserError, match="--run-dir 'runs/x': give its whole path, on storage that every node reaches"):
        require_whole_path("runs/x")


def test_no_secret_is_put_where_the_dashboard_shows_it() -> None:
    remember(["sk-live-0123456789"])
    require_no_secret(["seed=3"])
    with pytest.raises(UserError, match="the dashboard shows a job's command line") as refused:
        require_no_secret(["label.teachers.0.extra_body.key=sk-live-0123456789"])
    assert "sk-live" not in str(refused.value)


class Starting:
    """Fault injection: a job server whose first agent starts after some refused jobs."""

    def __init__(self, refuses: int) -> None:
        self.refuses = refuses

    def list_jobs(self) -> list[Any]:
        return []

    def submit_job(self, *, submission_id: str, **_: Any) -> str:
        self.refuses -= 1
        if self.refuses >= 0:
            raise RuntimeError("status code 500: No available agent to submit job, please try again")
        return submission_id


def test_a_cluster_that_has_just_started_is_given_the_job_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submission, "AGENT_RETRY_S", 0.0)
    monkeypatch.setattr(Jobs, "_connect", lambda _: Starting(2))
    assert Jobs("http://127.0.0.1:8265").submit(HANDED) == HANDED.key
    monkeypatch.setattr(submission, "AGENT_LIMIT_S", 0.0)
    with pytest.raises(UserError, match=r"does not accept the job: .*No available agent"):
        Jobs("http://127.0.0.1:8265").submit(HANDED)


class Full:
    """Simulated cluster: its jobs never end, and it has no room for a job that checks the nodes."""

    def __init__(self) -> None:
        self.jobs: list[Any] = []

    def list_jobs(self) -> list[Any]:
        return self.jobs

    def submit_job(
        self, *, entrypoint: str, submission_id: str, metadata: dict[str, str], runtime_env: dict[str, Any], **_: Any
    ) -> str:
        assert "doctor" not in entrypoint, "the nodes are checked"
        self.environment = runtime_env
        status = SimpleNamespace(value="RUNNING")
        self.jobs.append(SimpleNamespace(submission_id=submission_id, status=status, metadata=metadata))
        return submission_id


def test_the_same_run_is_followed_unless_it_is_to_do_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Full()
    monkeypatch.setattr(Jobs, "_connect", lambda _: server)
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "run.yaml"
    text = config_of().to_yaml()
    config.write_text(text)

    def submit(*options: str) -> Result:
        return CliRunner().invoke(app, ["submit", "run.yaml", "-d", "/shared/x", "--no-follow", *options])

    assert submit("--no-check", "--redo", "sft").output.startswith("submitted lorapar-x-")
    for same in ([], ["--redo", "sft"], ["--set", f"seed={config_of().seed}"]):
        assert submit(*same).output.startswith("following lorapar-x-")
    for other, said in (
        (["--redo", "grpo"], "without --redo grpo; wait for it"),
        (["--set", "seed=77"], "with other settings"),
    ):
        assert re.search(said, str(submit(*other).exception))
    config.write_text(text.replace(f"seed: {config_of().seed}", "seed: 78"))
    assert "with other settings" in str(submit().exception)
    assert len(server.jobs) == 1
    assert server.environment["env_vars"] == {"LORAPAR_WAIT_S": "400"}, "a killed driver's lock is waited for"
    assert server.environment["working_dir"] == str(tmp_path)


class Raced(Full):
    """Fault injection: another command submits the same run between this command's list of the jobs and submission."""

    def __init__(self, *earlier: str, **theirs: Any) -> None:
        super().__init__()
        self.jobs += [self.job(each, "FAILED", {}) for each in earlier]
        self.theirs = {"status": "RUNNING", "metadata": HANDED.metadata, "lost": "already exists", **theirs}
        self.lists = 0

    @staticmethod
    def job(name: str, status: str, metadata: dict[str, str]) -> Any:
        return SimpleNamespace(submission_id=name, status=SimpleNamespace(value=status), metadata=metadata)

    def list_jobs(self) -> list[Any]:
        self.lists += 1
        now = [*self.jobs]
        if self.lists == 1:
            name = HANDED.key if not now else f"{HANDED.key}-{len(now) + 1}"
            self.jobs.append(self.job(name, self.theirs["status"], self.theirs["metadata"]))
        return now

    def submit_job(self, *, submission_id: str, **_: Any) -> str:
        assert submission_id in [each.submission_id for each in self.jobs], "another number: both would run"
        raise (
            self.theirs["lost"]
            if isinstance(self.theirs["lost"], Exception)
            else RuntimeError(
                f"Request failed with status code 500: Job with submission_id {submission_id} {self.theirs['lost']}."
            )
        )


LOST = ConnectionError("Connection aborted: the answer was lost")


@pytest.mark.parametrize("theirs", [{}, {"status": "SUCCEEDED"}, {"lost": LOST}, {"lost": TimeoutError("600 s")}])
@pytest.mark.parametrize("earlier", [[], [HANDED.key], [HANDED.key, f"{HANDED.key}-2"]])
def test_a_job_that_another_command_submits_meanwhile_is_followed(
    theirs: dict[str, Any], earlier: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server = Raced(*earlier, **theirs)
    monkeypatch.setattr(Jobs, "_connect", lambda _: server)
    address = "http://127.0.0.1:8265"
    job = Jobs(address).submit(HANDED)
    assert job == server.jobs[-1].submission_id and len(server.jobs) == len(earlier) + 1
    assert capsys.readouterr().out == f"following {job} at {address}\n"


@pytest.mark.parametrize(
    ("status", "said"), [("RUNNING", "works on this run already, with other settings"), ("FAILED", "already exists")]
)
def test_a_job_of_other_settings_that_is_submitted_meanwhile_is_told(
    status: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Raced(status=status, metadata={**HANDED.metadata, "settings": "others"})
    monkeypatch.setattr(Jobs, "_connect", lambda _: server)
    with pytest.raises(UserError, match=said):
        Jobs("http://127.0.0.1:8265").submit(HANDED)


def test_a_job_s_number_is_free_also_if_earlier_jobs_were_deleted(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Full()
    monkeypatch.setattr(Jobs, "_connect", lambda _: server)
    for kept in (f"{HANDED.key}-2", "4711"):
        server.submit_job(entrypoint="", submission_id=kept, metadata={}, runtime_env={})
    server.jobs[0].status.value = "FAILED"
    assert Jobs("http://127.0.0.1:8265").submit(HANDED) == f"{HANDED.key}-3"


def test_a_job_that_tells_nothing_of_its_settings_is_followed() -> None:
    assert HANDED.not_in({}) == ""


@pytest.mark.parametrize(("address", "said"), [("head:6379", "give the URL of the"), ("http://127.0.0.1:9", "no Ray")])
def test_an_address_that_is_no_job_server_is_one_line(address: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        Jobs(address)


@pytest.mark.parametrize("address", ["http://127.0.0.1:40100", "http://authority.invalid:9", "http://localhost:4030"])
def test_an_address_that_reads_like_a_refused_token_blames_no_token(address: str) -> None:
    with pytest.raises(UserError, match=f"no Ray job server at {address}"):
        Jobs(address)


class Dashboard(BaseHTTPRequestHandler):
    """Simulated job server: its status, and what it answers."""

    status = 200
    answers: ClassVar[dict[str, Any]] = {}

    def do_GET(self) -> None:
        answer = json.dumps(self.answers.get(self.path, {"ray_version": "2.60.0"})).encode()
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def dashboard(answering: type[Dashboard]) -> Iterator[str]:
    """Yields its URL."""
    with ThreadingHTTPServer(("127.0.0.1", 0), answering) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_token_is_called_one(status: int) -> None:
    refusing = type("Refusing", (Dashboard,), {"status": status})
    said = "does not accept this machine's token; set RAY_AUTH_MODE=token"
    with dashboard(refusing) as address, pytest.raises(UserError, match=said):
        Jobs(address)


@pytest.mark.parametrize(("mode", "told"), [("disabled", True), ("token", False), (None, False)])
def test_a_cluster_that_asks_nobody_for_a_token_is_told_who_has_one(
    mode: str | None, told: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = {} if mode is None else {"/api/authentication_mode": {"authentication_mode": mode}}
    with dashboard(type("Open", (Dashboard,), {"answers": answers})) as address:
        monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
        Jobs(address)
        assert capsys.readouterr().err == ""
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        Jobs(address)
    assert (f"lorapar: the cluster at {address} asks nobody for a token" in capsys.readouterr().err) is told


@pytest.mark.parametrize("variable", ["RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"])
def test_a_given_address_wins_over_the_environment(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own client takes the environment's."""
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    elsewhere = "http://127.0.0.1:9"
    with dashboard(Dashboard) as address:
        monkeypatch.setenv(variable, elsewhere)
        jobs = Jobs(f"{address}/")
        assert (jobs.address, jobs._client.get_address()) == (f"{address}/", address)
        assert os.environ[variable] == elsewhere
        monkeypatch.setenv(variable, address)
        assert Jobs(None).address == address
    monkeypatch.delenv(variable)
    with pytest.raises(UserError, match=f"no Ray job server at {elsewhere} "):
        Jobs(elsewhere)
    assert "RAY_API_SERVER_ADDRESS" not in os.environ


def test_nodes_that_differ_are_named() -> None:
    other = report(versions={**report().versions, "torch": "2.0.0"})
    assert _versions(NODES, {"a": report(), "b": report()}).ok
    found = _versions(NODES, {"a": report(), "b": other})
    assert not found.ok and "torch is" in found.detail and "but 2.0.0 on 10.0.0.1" in found.detail
    missing = _versions(NODES, {"a": report(versions={**report().versions, "peft": None})})
    assert not missing.ok and "but none on 10.0.0.0" in missing.detail
    assert _nodes(NODES, {}).detail == "2 answer, 8 CPU, 0 GPU in all"
    assert "no answer from 10.0.0.1 within" in _nodes(NODES, {"b": SILENT}).detail
    both = _nodes(NODES, {"a": "OSError: libcudart.so.13", "b": "OSError: libcudart.so.13"}).detail
    assert both.startswith("no report from 10.0.0.0, 10.0.0.1 (OSError: libcudart.so.13); install the same lock")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--config", "run.yaml"], "--config: needs --cluster"),
        (["-d", "/shared/x"], "--run-dir: needs --cluster"),
        (["--set", "seed=3"], "--set: needs --cluster"),
        (["--cluster", "--set", "seed=3"], "--set: changes a config; give that with --config"),
    ],
)
def test_the_doctor_ignores_no_option(options: list[str], said: str) -> None:
    refused = CliRunner().invoke(app, ["doctor", *options]).exception
    assert isinstance(refused, UserError) and str(refused).startswith(said)


def test_a_gpu_that_torch_cannot_use_is_named() -> None:
    gpus = {**NODES, "b": {**NODES["b"], "Resources": {"GPU": 2}}}
    assert _gpus(gpus, {"a": report(), "b": report(gpus=2)}).ok
    found = _gpus(gpus, {"a": report(), "b": report(gpus=0)})
    assert not found.ok and "Ray counts 2 on 10.0.0.1 but torch can use 0" in found.detail


def test_gpus_that_stay_idle_are_told() -> None:
    """A head's may stay idle on purpose."""
    gpus = {**NODES, "b": {**NODES["b"], "Resources": {"GPU": 1}}}
    assert _gpus(gpus, {"a": report(), "b": report(gpus=1, installed=1)}).detail == "usable on 1 of 2 nodes"
    found = _gpus(gpus, {"a": report(installed=1), "b": report(gpus=2, installed=2)})
    assert found.ok and found.detail.startswith(
        "usable on 1 of 2 nodes; those of 10.0.0.0 stay idle: torch there cannot"
    )
    assert found.detail.endswith("; some of 10.0.0.1 stay idle: Ray there was started with fewer (--num-gpus)")


def test_storage_is_shared_or_the_node_is_named(tmp_path: Path) -> None:
    probe = Probe(str(tmp_path))
    probe.ask()
    assert [probe.answer(node)[0] for node in "ab"] == ["", ""]
    assert _storage(NODES, {"a": report(), "b": report()}, probe).ok
    found = _storage(NODES, {"a": report(), "b": report(storage="No such file or directory")}, probe)
    assert not found.ok and "is not shared with 10.0.0.1 (No such file or directory)" in found.detail
    (tmp_path / f"{probe.name}-b").unlink()
    found = _storage(NODES, {"a": report(), "b": report()}, probe)
    assert not found.ok and "10.0.0.1 (other nodes do not see its files)" in found.detail
    assert probe.answer("b")[0] == ""
    full = _storage(NODES, {"a": report(), "b": report(free_gib=0.5)}, probe)
    assert not full.ok and "0 GiB free (needs 2)" in full.detail
    probe.remove()
    assert not list(tmp_path.iterdir())
    assert probe.answer("b") == ("No such file or directory", 0.0)


def test_models_and_keys_are_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    found = _models_found(NODES, {"a": report(), "b": report(models={"/m": "model '/m': no such directory"})})
    assert not found.ok and found.detail == "on 10.0.0.1: model '/m': no such directory"
    config = config_of()
    monkeypatch.delenv("A_KEY", raising=False)
    where = "where the head node's Ray starts, since jobs run there"
    assert _keys(config).detail == f"teacher 't': environment variable A_KEY is not set; export it {where}"
    monkeypatch.setenv("A_KEY", "a b")
    assert _keys(config).detail.endswith(f"so it is not an API key; export it again {where}")
    monkeypatch.setenv("A_KEY", "abc")
    assert _keys(config).detail == "A_KEY set"


@pytest.mark.parametrize(
    ("has", "said"),
    [
        (
            Capacity({"CPU": 3}),
            r"grpo: asks for 4 CPU \(rollout_actors 1 × 1, learners 3 × 1\) but the cluster has 3; lower",
        ),
        (Capacity({}, {"CPU": 3}), "but the cluster has 0 and may grow to 3"),
        (Capacity({}, {"CPU": 4}), ""),
    ],
)
def test_a_cluster_without_room_for_a_later_stage_is_refused_before_the_first(has: Capacity, said: str) -> None:
    for most in (None, 8):  # the fewest of a range must fit
        found = _room(config_of(grpo={"learners": 3, "max_learners": most}), has)
        assert found.ok == (not said) and re.search(said, found.detail)


@pytest.mark.parametrize(
    ("cpus", "said"), [(3, ""), (2, r"evaluate: asks for 3 CPU \(engines 3 × 1\) but the cluster")]
)
def test_the_fewest_engines_of_the_evaluation_must_fit(cpus: int, said: str) -> None:
    found = _room(config_of(evaluate={"engines": [3, 8]}), Capacity({"CPU": cpus}))
    assert found.ok == (not said) and re.search(said, found.detail)
