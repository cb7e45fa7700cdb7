"""`lorapar serve` loses its engine, and then itself: the same questions have the same answers again."""

from pathlib import Path
from random import Random

import psutil
import pytest
from openai import OpenAI

from tests.chaos import Recovery
from tests.e2e.conftest import FinishedRun
from tests.e2e.test_interruption import engines_of
from tests.e2e.test_job import free_port
from tests.e2e.test_serve import SECRET, ask, serving

pytestmark = pytest.mark.e2e
MODELS = ("base", "sft", "grpo", "auto")
PATIENT = 20
"""Retries of the client, which waits longer before each, up to 8 s."""
END_S = 120


@pytest.mark.chaos("serve", "engine child", "driver")
def test_an_engine_and_the_command_itself_may_die(
    chance: Random, recovery: Recovery, finished: FinishedRun, tmp_path: Path
) -> None:
    port, first, log = free_port(), chance.randrange(100), tmp_path / "log"
    client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=SECRET, max_retries=PATIENT, timeout=120)

    def answers() -> list[tuple[str, str, str | None]]:
        return [ask(client, model, f"{first + number} + 5 =") for number in range(2) for model in MODELS]

    with serving(finished.run, port, log) as (process, _):
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
