"""The leading learner's policies on their way to the engines, while it goes on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from lorapar_ray.engines.policy import Policy, note_of
from lorapar_ray.grpo.canaries import Canary


class Publisher:
    """Publishes one policy at a time; whoever changes the policy waits until the last one is proved."""

    def __init__(self, coordinator: Any) -> None:
        self._coordinator = coordinator
        self._answer: Any = None
        self.figures: dict[str, float] = {}
        """What the coordinator found when the last policy was proved, and how long this process waited for it."""

    def publish(self, policy: Policy, canaries: Sequence[Canary]) -> None:
        """Put a policy into the object store and begin to publish it; only its note goes to the coordinator."""
        import ray

        self._answer = self._coordinator.publish.remote(note_of(policy, ray.put(policy)), list(canaries))

    def wait(self) -> None:
        """Until every engine has proved the policy.

        Raises:
            PolicyMismatch: one of them does not serve it.
        """
        import ray

        start = time.monotonic()
        self.figures = ray.get(self._answer)
        self.figures["seconds/wait_for_proof"] = time.monotonic() - start
