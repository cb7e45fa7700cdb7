"""What stage 2 draws, whatever has died on the way."""

from collections.abc import Sequence
from typing import Any


def require_each_step_and_prompt_once(lines: Sequence[dict[str, Any]], prompts: int | None = None) -> None:
    """No step is missing or done twice, and no epoch draws a prompt twice.

    Args:
        lines: of the run's metrics.
        prompts: of an epoch; None: those that were drawn at all.
    """
    assert [line["policy_version"] for line in lines] == list(range(1, len(lines) + 1))
    drawn = [prompt for line in lines for prompt in line["prompts"]]
    epoch = prompts or len(set(drawn))
    for first in range(0, len(drawn), epoch):
        assert len(set(drawn[first : first + epoch])) == len(drawn[first : first + epoch])
