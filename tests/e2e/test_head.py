"""The head of the cluster is killed and started again while a run works: with a store for its state the run goes on."""

from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from lorapar_ray.ray_files import private_directory
from tests.chaos import Recovery
from tests.e2e.conftest import FinishedRun
from tests.e2e.disturbed import ends_undisturbed
from tests.e2e.head import Head, redis

pytestmark = pytest.mark.e2e
DOWN_S = (2, 20)
"""Ray's own processes give up a head after a minute."""


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Head]:
    """Of a cluster of this machine alone, with Redis."""
    with private_directory(Path("/tmp")) as folder, redis(tmp_path / "redis") as store:
        head = Head(folder / "r", store)
        try:
            yield head
        finally:
            head.stop()


@pytest.mark.chaos("label", "head")
@pytest.mark.chaos("score", "head")
@pytest.mark.chaos("sft", "head")
@pytest.mark.chaos("grpo", "head")
@pytest.mark.chaos("evaluate", "head")
def test_a_head_that_is_started_again(
    chance: Random, recovery: Recovery, finished: FinishedRun, head: Head, tmp_path: Path
) -> None:
    def restart(stage: str) -> str:
        seconds = chance.uniform(*DOWN_S)
        head.restart(seconds)
        return f"head away for {seconds:.0f} s"

    ends_undisturbed(finished, tmp_path / "run", head.environment, restart, chance, recovery)
