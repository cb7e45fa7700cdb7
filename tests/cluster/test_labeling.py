"""Labelling through Ray Data with simulated teachers and endpoints: no fault loses a question or requests a vote
twice."""

import asyncio
import json
import os
import random
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from lorapar_ray.config import Config, LabelConfig
from lorapar_ray.datasets.prepare import prepare
from lorapar_ray.datasets.rows import read_table
from lorapar_ray.errors import UserError
from lorapar_ray.labeling.asker import asked
from lorapar_ray.labeling.job import label
from lorapar_ray.labeling.simulated import true_system
from lorapar_ray.labeling.store import question_key
from lorapar_ray.runs import RunDirectory
from tests.chaos import Recovery
from tests.cluster.faulty_teachers import noted
from tests.e2e.twin import ends_as_its_twin
from tests.majority import majority_accuracy
from tests.tiny_run import ROOT, command, lorapar, stored_votes, write_config
from tests.waiting import beside, wait_until

pytestmark = pytest.mark.cluster
ROWS = 120
Settings = dict[str, Any]


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "run")


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "asked.log"


def faulty(name: str, log: Path, **settings: Any) -> Settings:
    body = {"log": str(log), "latency_s": 0.02, **settings}
    return {"name": name, "kind": "python", "model": "tests.cluster.faulty_teachers:FaultyTeacher", "extra_body": body}


def settings(folder: Path, teachers: list[Settings], rows: int = ROWS, **changes: Any) -> Settings:
    source = folder / "rows.jsonl"
    if not source.is_file():
        source.write_text("".join(json.dumps({"prompt": f"q{i}", "answer": str(i)}) + "\n" for i in range(rows)))
    voting = {"calibration": "none", "rows_per_block": 8, "concurrency": 16, "backoff_s": 0.01, "give_up_after": 6}
    return {
        "name": "labelling",
        "model": {"path": "owner/student"},
        "data": {"train": [{"reader": "file", "path": str(source)}]},
        "label": {**voting, "teachers": teachers, "resources": {"cpus": 0.5}, **changes},
    }


def labelled(config: Settings, run: RunDirectory) -> dict[str, Any]:
    """Run the stage in this process; returns its summary."""
    tree = Config.model_validate(config)
    prepare(tree, run)
    label(tree, run)
    summary: dict[str, Any] = json.loads((run.label_summary).read_text())
    return summary


def ids_of(run: RunDirectory) -> list[str]:
    """Ids in labels and rejects, with repetitions."""
    reject = run.rejects / "label.parquet"
    return [row["id"] for row in chain(read_table(run.labels), read_table(reject) if reject.is_file() else [])]


def complete(run: RunDirectory) -> bool:
    """Whether every question is in labels or rejects exactly once."""
    asked = pq.read_table(run.data / "train.parquet").column("id").to_pylist()
    return sorted(ids_of(run)) == sorted(asked)


@pytest.fixture(scope="module")
def undisturbed(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """Labelled by the teachers that the killed runs have too, which answer at once here."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run = RunDirectory(folder / "run")
    labelled(settings(folder, [faulty(name, folder / "log", latency_s=0.0) for name in "ab"]), run)
    return run


def test_the_majority_of_simulated_teachers_is_as_good_as_the_binomial_says(
    cluster: None, run: RunDirectory, tmp_path: Path
) -> None:
    teachers = [
        {
            "name": name,
            "kind": "python",
            "model": "lorapar_ray.labeling.simulated:SimulatedTeacher",
            "extra_body": {"accuracy": 0.7},
        }
        for name in "abc"
    ]
    summary = labelled(settings(tmp_path, teachers, rows=3000, rows_per_block=256, concurrency=256), run)
    rows = read_table(run.labels)
    right = sum(row["system"] == true_system(row["prompt"], row["answer"]) for row in rows)
    expected = majority_accuracy(0.7, 3)
    assert abs(right / 3000 - expected) < 3.3 * (expected * (1 - expected) / 3000) ** 0.5
    assert complete(run) and summary["votes"] == 9000 and summary["votes_per_second"] > 0
    assert summary["teachers"]["a"]["latency"]["p50"] < 1 and summary["tokens"] == 9000


def requests_of_stored(run: RunDirectory, log: Path) -> Counter[tuple[str, str]]:
    """The logged requests for questions whose two votes are stored; no further one may come."""
    votes = Counter(question for question, _ in stored_votes(run.root))
    stored = {f"q{i}" for i in range(ROWS) if votes[question_key(f"q{i}", str(i))] == 2}
    return Counter({asked: count for asked, count in noted(log).items() if asked[1] in stored})


@pytest.mark.chaos("label", "driver")
def test_kill_9_on_the_driver_costs_only_the_blocks_in_flight(
    chance: random.Random,
    recovery: Recovery,
    undisturbed: RunDirectory,
    run: RunDirectory,
    log: Path,
    tmp_path: Path,
) -> None:
    votes = chance.randint(30, 120)
    config = settings(tmp_path, [faulty(name, log, latency_s=0.5) for name in "ab"])
    arguments = ("label", "-c", write_config(tmp_path / "config.yaml", config), "-d", run.root)
    process = subprocess.Popen(
        command(*arguments), cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_until("a vote is stored", lambda: len(stored_votes(run.root)) > votes, 300)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)
    worker = int(log.read_text().splitlines()[-1].split()[0])
    # it sends requests until it notices that its driver has ended
    wait_until("the worker ends", lambda: not psutil.pid_exists(worker), 300)
    before = requests_of_stored(run, log)
    asked, kept = sum(noted(log).values()), len(stored_votes(run.root))
    assert votes < kept < 2 * ROWS and not (run.label_summary).exists()
    with recovery("label", "driver"):
        again = lorapar(*arguments)
    assert again.returncode == 0, again.stderr
    assert again.stderr == "", "Ray has no line in a good run's output"
    assert complete(run)
    twice = sum(count - 1 for count in noted(log).values())
    checks = 2  # each command first asks each of the two teachers one question, to know whether it answers
    assert twice <= asked - kept + checks, f"{twice} asked for again, though only {asked - kept} were not stored"
    assert "votes asked for" in again.stdout
    assert before and before.items() <= noted(log).items(), "a stored vote was asked for again"
    ends_as_its_twin("label", run.root, undisturbed.root)


@pytest.mark.chaos("label", "worker")
def test_kill_9_on_an_asking_worker_in_mid_run(
    chance: random.Random,
    recovery: Recovery,
    undisturbed: RunDirectory,
    run: RunDirectory,
    log: Path,
    tmp_path: Path,
) -> None:
    asked = chance.randint(40, 120)
    config = settings(tmp_path, [faulty(name, log, latency_s=0.5) for name in "ab"])
    driver = str(os.getpid())

    def workers() -> set[int]:
        lines = log.read_text().splitlines() if log.is_file() else []
        return {int(line.split()[0]) for line in lines if line.split()[0] != driver}

    before: Counter[tuple[str, str]] = Counter()

    def murder() -> None:
        wait_until("workers ask", lambda: workers() and sum(noted(log).values()) > asked, 300)
        wait_until("votes are stored", lambda: requests_of_stored(run, log), 300)
        before.update(requests_of_stored(run, log))
        killed = workers()
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        with recovery("label", "worker"):
            wait_until("another worker asks", lambda: workers() - killed, 300)

    with beside(murder):
        summary = labelled(config, run)
    assert len(workers()) == 2, "no worker was replaced"
    assert complete(run) and summary["votes"] == 2 * ROWS
    teachers, rows_per_block, blocks_in_flight = 2, 8, 6
    queue = teachers * rows_per_block * blocks_in_flight  # what the killed worker may have asked for in vain
    assert sum(count - 1 for count in noted(log).values()) <= queue
    assert before and before.items() <= noted(log).items(), "a stored vote was asked for again"
    ends_as_its_twin("label", run.root, undisturbed.root)


def test_a_dead_teacher_abstains_and_below_the_quorum_the_job_stops_and_goes_on_later(
    cluster: None, run: RunDirectory, log: Path, tmp_path: Path
) -> None:
    away = tmp_path / "away"
    teachers = [faulty("a", log), faulty("b", log, die_after=20), faulty("c", log, dead_while=str(away))]
    config = settings(tmp_path, teachers, quorum=2)
    away.touch()
    with pytest.raises(UserError, match=r"label: 1 of 3 teachers answer, label\.quorum is 2 .*dead|away"):
        labelled(config, run)
    before = noted(log)
    assert not run.labels.exists() and before["a", "q0"] == 1
    away.unlink()
    summary = labelled(config, run)
    assert complete(run) and summary["split"]["1"] + summary["split"]["2"] == ROWS
    assert noted(log)["a", "q0"] == 1, "a vote that was stored was asked for again"
    assert "dead" in summary["teachers"]["b"]["given_up"] and summary["teachers"]["b"]["abstained"] > ROWS / 2
    assert any("teacher b was given up" in warning for warning in summary["warnings"])
    assert summary["teachers"]["c"]["abstained"] == 0


def test_from_three_to_five_teachers_only_the_new_two_are_asked(
    cluster: None, run: RunDirectory, log: Path, tmp_path: Path
) -> None:
    config = settings(tmp_path, [faulty(name, log, accuracy=0.8) for name in "abc"], rows=40)
    first = labelled(config, run)
    assert (first["votes_asked"], first["votes_from_cache"]) == (120, 0)
    asked = noted(log)
    (run.work / "label" / "run.json").unlink()  # as the pipeline does when the stage's settings change
    config["label"]["teachers"] += [faulty(name, log, accuracy=0.8) for name in "de"]
    second = labelled(config, run)
    new = noted(log) - asked
    assert {teacher for teacher, question in new if question != "N/A"} == {"d", "e"}
    assert (second["votes_asked"], second["votes_from_cache"], second["votes"]) == (80, 120, 200)
    (run.work / "label" / "run.json").unlink()
    config["label"] |= {"weights": "confidence", "sequential": True}
    before = noted(log)
    third = labelled(config, run)
    assert third["votes_asked"] == 0 and noted(log) == before, "what is only counted anew needs no teacher"


def test_sequential_voting_saves_votes_and_says_so(
    cluster: None, run: RunDirectory, log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prices = {"dear": 9.0, "cheap": 1.0, "fair": 2.0}
    teachers = [{**faulty(name, log, accuracy=0.9), "cost_per_million_tokens": p} for name, p in prices.items()]
    summary = labelled(settings(tmp_path, teachers, sequential=True), run)
    questions = [f"q{i}" for i in range(ROWS)]
    asked = noted(log)
    assert all(asked["cheap", q] and asked["fair", q] for q in questions)
    dear = [q for q in questions if asked["dear", q]]
    assert 0 < len(dear) < ROWS / 2
    assert summary["votes"] == 2 * ROWS + len(dear) and summary["teachers"]["dear"]["not_asked"] == ROWS - len(dear)
    assert "not needed for a majority" in capsys.readouterr().out


def test_endpoints_that_answer_429_500_garbage_or_never(cluster: None, run: RunDirectory, tmp_path: Path) -> None:
    with endpoint() as url:
        teachers = [
            {"name": name, "kind": "remote", "model": name, "base_url": url}
            for name in ("good", "busy", "broken", "garbled", "silent", "forbidden")
        ]
        teachers += [{"name": "chat", "kind": "remote", "model": "chat", "base_url": url, "endpoint": "chat"}]
        changes = {"timeout_s": 2.5, "retries": 2, "quorum": 3, "calibration": "content_free"}
        summary = labelled(settings(tmp_path, teachers, rows=24, **changes), run)
    assert complete(run) and summary["rows"] == 24
    found = summary["teachers"]
    assert {name: found[name]["abstained"] for name in ("good", "busy", "chat")} == {"good": 0, "busy": 0, "chat": 0}
    for name, why in (
        ("broken", "status 500"),
        ("garbled", "JSON"),
        ("silent", "Timeout"),
        ("forbidden", "status 401"),
    ):
        assert found[name]["abstained"] == 24 and why in found[name]["given_up"], found[name]
    assert found["good"]["tokens"] == 24 * 12
    assert all({vote["teacher"] for vote in row["votes"]} == {"good", "busy", "chat"} for row in read_table(run.labels))


def test_ray_data_shows_and_exports_no_secret_of_a_teacher(cluster: None) -> None:
    from ray.data._internal.metadata_exporter import sanitize_for_struct

    hidden = ("a-key", "a-password", "a-token")
    body = {"headers": {"token": hidden[2]}}
    teacher = {"name": "far", "kind": "remote", "model": "m", "base_url": f"https://me:{hidden[1]}@host/v1"}
    config = LabelConfig.model_validate({"teachers": [{**teacher, "extra_body": body}]})
    results = asked(1, config, {"keys": {"far": hidden[0]}})
    shown = str(sanitize_for_struct(results._logical_plan.dag._get_args(), truncate_length=10**6))
    assert "Asker" in shown and "***" in shown and not [each for each in hidden if each in shown]


def test_a_question_without_any_vote_is_rejected_with_the_reason(
    cluster: None, run: RunDirectory, tmp_path: Path
) -> None:
    with endpoint() as url:
        teachers = [{"name": "picky", "kind": "remote", "model": "picky", "base_url": url}]
        summary = labelled(settings(tmp_path, teachers, rows=24), run)
    (rejected,) = read_table(run.rejects / "label.parquet")
    assert complete(run) and (summary["rows"], summary["rejected"]) == (23, 1)
    assert rejected["stage"] == "label" and rejected["prompt"] == "q7"
    assert "no teacher answered (picky: Refused: status 400" in rejected["reason"]


def test_three_systems_and_weights_by_confidence(cluster: None, run: RunDirectory, tmp_path: Path) -> None:
    kinds = {1: "recall", 2: "inference", 3: "planning"}
    with endpoint() as url:
        teachers = [{"name": "thirds", "kind": "remote", "model": "thirds", "base_url": url}]
        changes = {"definitions": kinds, "examples": [], "weights": "confidence", "calibration": "swapped_definitions"}
        summary = labelled(settings(tmp_path, teachers, rows=30, **changes), run)
    assert summary["split"] == {"1": 10, "2": 10, "3": 10}
    assert summary["teachers"]["thirds"]["bias"]["3"] > 1, "the endpoint's leaning to the number 3 was not measured"
    assert summary["tokens"] == 30 * 12 * 3


@contextmanager
def endpoint() -> Iterator[str]:
    """An OpenAI-compatible server on loopback that misbehaves by model name."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()


class Endpoint(BaseHTTPRequestHandler):
    """Fault injection, by the request's `model`."""

    protocol_version = "HTTP/1.1"
    lottery = random.Random(0)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        model = body["model"]
        if model == "silent":
            time.sleep(20)
        if model == "busy" and self.lottery.random() < 0.3:
            self._send(429, b"slow down", {"Retry-After": "0.05"})
        elif model == "broken":
            self._send(500, b"oops")
        elif model == "forbidden":
            self._send(401, b"no such key")
        elif model == "garbled":
            self._send(200, b"<html>not what you think</html>")
        elif model == "picky" and "Question: q7\n" in body["prompt"]:
            self._send(400, b"I do not like this one")
        elif self.path == "/v1/chat/completions":
            content = [{"token": "System", "logprob": -0.1, "top_logprobs": []}, _token("2")]
            self._send(200, json.dumps({"choices": [{"logprobs": {"content": content}}]}).encode())
        else:
            table = _thirds(body["prompt"]) if model == "thirds" else {" 1": -0.3, " 2": -1.4, " the": -3.0}
            answer = {"choices": [{"text": " 1", "logprobs": {"top_logprobs": [table]}}], "usage": {"total_tokens": 12}}
            self._send(200, json.dumps(answer).encode())

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        try:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)
        except OSError:  # the client has closed the connection
            self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass


def _token(chosen: str) -> dict[str, Any]:
    other = "1" if chosen == "2" else "2"
    alternatives = [{"token": chosen, "logprob": -0.2}, {"token": other, "logprob": -1.8}]
    return {"token": chosen, "logprob": -0.2, "top_logprobs": alternatives}


def _thirds(prompt: str) -> dict[str, float]:
    """Judges q0, q1, q2, ... in turn as recall, inference, planning; biased towards the number 3 in every order."""
    number = prompt.rpartition("Question: q")[2].split("\n")[0]
    meant = ("recall", "inference", "planning")[int(number) % 3 if number.isdigit() else 0]
    shown = {meaning: number for number in "123" for meaning in prompt.split(f"System {number}: ")[1].split(".")[:1]}
    return {f" {number}": -2.0 + 1.0 * (shown[meant] == number) + 4.0 * (number == "3") for number in "123"}


def test_the_rate_limit_is_kept_by_all_workers_together(tmp_path: Path) -> None:
    from lorapar_ray.labeling.panel import Panel

    with endpoint() as url:
        teacher = {"name": "good", "kind": "remote", "model": "good", "base_url": url, "requests_per_second": 40}
        config = LabelConfig.model_validate({"teachers": [teacher], "calibration": "none", "workers": 2})

        async def ask() -> float:
            panel = Panel(config, {}, {}, "student")
            start = time.monotonic()
            found = await asyncio.gather(*(panel.ask(config.teachers[0], f"q{i}", "1") for i in range(21)))
            assert all(isinstance(each, list) for each in found)
            return time.monotonic() - start

        assert asyncio.run(ask()) >= 20 / 20  # each of two workers sends at most half of 40 per second
