"""Failures of rewards and environments, as a run reports them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from lorapar_ray.errors import UserError
from lorapar_ray.grpo.groups import Group
from lorapar_ray.progress import console
from lorapar_ray.text import one_line


class Failures:
    """Shows the first failure of a reward and of an environment, once for the run."""

    def __init__(self) -> None:
        self._told = self._told_of_episodes = False

    def report(self, groups: Sequence[Group], step: int) -> None:
        """Look at every group of a step.

        Raises:
            UserError: a reward failed on every sample of the step, or every episode is lost.
        """
        samples = sum(len(group.rewards) for group in groups)
        lost = [text for group in groups for text in group.head.lost]
        if lost and not samples:
            raise UserError(f"grpo.environment: all {len(lost)} episodes of step {step + 1} are lost; one: {lost[0]}")
        if lost and not self._told_of_episodes:
            self._told_of_episodes = True
            console.print(f"  an episode is lost, and its sample with it; the first: {lost[0]}")
        failed = sum((Counter(group.failed) for group in groups), Counter[str]())
        errors = {name: text for group in reversed(groups) for name, text in group.errors.items()}
        for name, count in failed.items():
            if count == samples:
                raise UserError(
                    f"grpo.rewards: '{name}' failed on all {samples} samples of step {step + 1}: {errors[name]}"
                )
        if errors and not self._told:
            self._told = True
            first = "; ".join(f"{name}: {text}" for name, text in errors.items())
            told = one_line(first, 500)
            console.print(f"  a reward failed on some samples; those without a value count 0 for it; the first: {told}")
