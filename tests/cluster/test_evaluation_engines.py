"""The evaluation's engines, of which some ran before it, join or die. They only pretend to answer: faults are
injected."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from lorapar_ray.config import EngineConfig, Resources
from lorapar_ray.engines.requests import Answer, Request, answer_table
from lorapar_ray.engines.supervisor import LOSSES
from lorapar_ray.errors import UserError
from lorapar_ray.evaluation import engines as evaluation_engines
from lorapar_ray.evaluation.engines import Engines
from tests.chaos import Recovery

pytestmark = pytest.mark.cluster
REQUESTS = [Request("generate", [1, number]) for number in range(60)]


class FakeEngine:
    """Answers with its process id; ends with its process when it is asked for the `dies_at`-th time.

    It dies no sooner than the caller creates the file `received`: a process that ends loses what it has just returned.
    """

    def __init__(self, dies_at: int | None = None, received: Path | None = None) -> None:
        self._left = dies_at
        self._received = received

    def start(self) -> None:
        if self._left == 0:
            os._exit(1)

    def answer(self, requests: pa.Table, digest: str, policy: Sequence[Any]) -> pa.Table:
        if self._left is not None:
            self._left -= 1
            if self._left <= 0:
                while self._received is not None and not self._received.exists():
                    time.sleep(0.01)
                os._exit(1)
        return answer_table([Answer(key, tokens=[os.getpid()]) for key in requests["key"].to_pylist()])

    def leave(self) -> None: ...


@pytest.fixture
def made(cluster: None, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The actors that were started since."""
    import ray

    started: list[Any] = []

    def start(*_: object, **__: object) -> Any:
        started.append(ray.remote(FakeEngine).options(num_cpus=0).remote())
        return started[-1]

    monkeypatch.setattr(evaluation_engines, "start_engine", start)
    return started


def test_an_engine_that_runs_answers(made: list[Any], tmp_path: Path) -> None:
    assert len(processes_that_answer(None, tmp_path / "received")) == 1
    assert made == []


@pytest.mark.parametrize("dies_at", [0, 2])
@pytest.mark.fault("evaluate", "engine child")
def test_a_running_engine_that_is_lost_is_replaced_and_costs_no_answer(
    dies_at: int, made: list[Any], recovery: Recovery, tmp_path: Path
) -> None:
    with recovery("evaluate", "engine child", "one that only pretends to answer, from its start on"):
        processes = processes_that_answer(dies_at, tmp_path / "received")
    assert len(made) == 1
    assert len(processes) == (2 if dies_at else 1)


def test_an_engine_that_joins_answers_while_the_first_one_hangs(made: list[Any], tmp_path: Path) -> None:
    """The first one hangs, and then dies, with all that it was given; no other answers before."""
    processes = processes_that_answer(1, tmp_path / "received", most=2)
    assert processes and len(made) == 2  # the one that joined, and the one that replaces the first


def test_requests_that_end_every_engine_end_the_evaluation(made: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    dying = ray.remote(FakeEngine).options(num_cpus=0)
    monkeypatch.setattr(evaluation_engines, "start_engine", lambda *_, **__: dying.remote(1))
    with Engines("m", EngineConfig(max_num_seqs=32), Resources(cpus=0)) as engines:
        engines.start()
        lost = r"^evaluate: .*lost.*; answers so far are kept\. \w*Actor\w*Error: "
        with pytest.raises(UserError, match=lost) as said:
            list(engines.answers(REQUESTS))
    assert str(LOSSES) in str(said.value) and "\n" not in str(said.value)


def processes_that_answer(dies_at: int | None, received: Path, most: int | None = None) -> set[int]:
    """All requests, to a running engine; no answer is missing or there twice.

    Args:
        most: another engine may join; then the running one gets only a part of the requests at a time.
    """
    import ray

    running = ray.remote(FakeEngine).options(num_cpus=0).remote(dies_at, received)
    settings = EngineConfig(max_num_seqs=32 if most is None else 8)
    with Engines("m", settings, Resources(cpus=0), most=most, running=[running]) as engines:
        engines.start()
        answers = []
        for found in engines.answers(REQUESTS):
            answers += found
            received.touch()
    assert sorted(answer.key for answer in answers) == sorted(request.key for request in REQUESTS)
    return {answer.tokens[0] for answer in answers}
