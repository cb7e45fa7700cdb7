"""The wall clock jumps by hours, forwards and backwards, while a run works: nobody's time is up."""

from pathlib import Path
from random import Random

import pytest

from tests.chaos import Recovery
from tests.e2e.clock import LONGEST_H, WallClock
from tests.e2e.conftest import FinishedRun
from tests.e2e.disturbed import ends_undisturbed

pytestmark = pytest.mark.e2e


@pytest.mark.chaos("label", "clock jump")
@pytest.mark.chaos("score", "clock jump")
@pytest.mark.chaos("sft", "clock jump")
@pytest.mark.chaos("grpo", "clock jump")
@pytest.mark.chaos("evaluate", "clock jump")
def test_hours_that_nobody_lived_through(
    chance: Random, recovery: Recovery, finished: FinishedRun, tmp_path: Path
) -> None:
    clock = WallClock(tmp_path / "clock")

    def jump(stage: str) -> str:
        hours = chance.uniform(1, LONGEST_H) * chance.choice((1, -1))
        clock.jump_to(clock.hours + hours)
        return f"by {hours:+.0f} h"

    ends_undisturbed(finished, tmp_path / "run", clock.environment, "clock jump", jump, chance, recovery)
