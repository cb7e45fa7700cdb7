"""The head of the cluster is killed and started again while a run works: with a store for its state the run goes on."""

from pathlib import Path
from random import Random

import pytest

from tests.chaos import Recovery
from tests.e2e.conftest import FinishedRun
from tests.e2e.disturbed import ends_undisturbed
from tests.e2e.head import DOWN_S, head_with_store

pytestmark = pytest.mark.e2e


@pytest.mark.chaos("label", "head")
@pytest.mark.chaos("score", "head")
@pytest.mark.chaos("sft", "head")
@pytest.mark.chaos("grpo", "head")
@pytest.mark.chaos("evaluate", "head")
def test_a_head_that_is_started_again(
    chance: Random, recovery: Recovery, finished: FinishedRun, tmp_path: Path
) -> None:
    def restart(stage: str) -> str:
        seconds = chance.uniform(*DOWN_S)
        head.restart(seconds)
        return f"away for {seconds:.0f} s"

    with head_with_store(tmp_path / "redis") as head:
        ends_undisturbed(finished, tmp_path / "run", head.environment, "head", restart, chance, recovery)
