"""`lorapar serve` loses its engine, its head, its memory, its clock, and then itself: a client that waits gets the same
answers."""

import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import psutil
import pytest
from openai import OpenAI

from tests.chaos import Recovery
from tests.e2e.clock import LONGEST_H, WallClock
from tests.e2e.conftest import FinishedRun
from tests.e2e.head import DOWN_S, head_with_store
from tests.e2e.memory import replaceable
from tests.e2e.test_serve import SECRET, ask, serving
from tests.ports import free_port
from tests.processes import engines_of

pytestmark = pytest.mark.e2e
MODELS = ("base", "sft", "grpo", "auto")
PATIENT = 20
"""Retries of the client, which waits longer before each, up to 8 s."""
END_S = 120
Answers = list[tuple[str, str, str | None]]


def patient(address: str) -> OpenAI:
    """A client that asks again for some minutes."""
    return OpenAI(base_url=address, api_key=SECRET, max_retries=PATIENT, timeout=120)


def asks(address: str, first: int) -> Callable[[], Answers]:
    """A function that asks every model two questions, the same each time."""
    client = patient(address)
    return lambda: [ask(client, model, f"{first + number} + 5 =") for number in range(2) for model in MODELS]


def meanwhile(answers: Callable[[], Answers], fault: Callable[[], object]) -> Answers:
    """The answers to questions that are asked from the fault's beginning on."""
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(answers)
        fault()
        return asked.result()


@pytest.mark.chaos("serve", "engine child", "driver")
def test_an_engine_and_the_command_itself_may_die(
    chance: Random, recovery: Recovery, finished: FinishedRun, tmp_path: Path
) -> None:
    port, first, log = free_port(), chance.randrange(100), tmp_path / "log"
    with serving(finished.run, port, log) as (process, address):
        answers = asks(address, first)
        undisturbed = answers()
        [engine] = engines_of(process.pid, "ray::ServeReplica")
        engine.kill()
        with recovery("serve", "engine child"):
            assert answers() == undisturbed
        below = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        _, left = psutil.wait_procs(below, timeout=END_S)
        assert not left
    with recovery("serve", "driver"), serving(finished.run, port, log):
        assert answers() == undisturbed


@pytest.mark.chaos("serve", "head")
def test_a_head_that_is_started_again(
    chance: Random, recovery: Recovery, finished: FinishedRun, tmp_path: Path
) -> None:
    first, seconds = chance.randrange(100), chance.uniform(*DOWN_S)
    with (
        head_with_store(tmp_path / "redis") as head,
        serving(finished.run, free_port(), tmp_path / "log", head.environment) as (process, address),
    ):
        answers = asks(address, first)
        undisturbed = answers()
        with recovery("serve", "head", f"away for {seconds:.0f} s"):
            assert meanwhile(answers, lambda: head.restart(seconds)) == undisturbed
            assert answers() == undisturbed
        [engine] = engines_of(head.raylet.pid, "ray::ServeReplica")
        engine.kill()
        with recovery("serve", "head", "an engine, after it"):
            assert answers() == undisturbed
        process.send_signal(signal.SIGINT)
        assert process.wait(END_S) == 0


@pytest.mark.chaos("serve", "out of memory")
def test_memory_that_runs_out(chance: Random, recovery: Recovery, finished: FinishedRun, tmp_path: Path) -> None:
    memory, first = replaceable(tmp_path / "memory"), chance.randrange(100)
    with serving(finished.run, free_port(), tmp_path / "log", around=memory.around) as (_, address):
        answers = asks(address, first)
        undisturbed = answers()
        with recovery("serve", "out of memory"):
            assert meanwhile(answers, memory.run_out) == undisturbed
            assert answers() == undisturbed


@pytest.mark.chaos("serve", "clock jump")
def test_hours_that_nobody_lived_through(
    chance: Random, recovery: Recovery, finished: FinishedRun, tmp_path: Path
) -> None:
    clock, first = WallClock(tmp_path / "clock"), chance.randrange(100)
    with serving(finished.run, free_port(), tmp_path / "log", clock.environment) as (_, address):
        answers = asks(address, first)
        undisturbed = answers()
        for way in (1, -1):
            hours = way * chance.uniform(1, LONGEST_H)
            with recovery("serve", "clock jump", f"by {hours:+.0f} h"):
                assert meanwhile(answers, lambda hours=hours: clock.jump_to(clock.hours + hours)) == undisturbed
                assert answers() == undisturbed
