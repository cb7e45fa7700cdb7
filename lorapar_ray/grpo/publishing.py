"""Publishes rank 0's policies to the engines while it continues to train."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from lorapar_ray.engines.canaries import Canary
from lorapar_ray.engines.policy import Policy, note_of
from lorapar_ray.engines.policy_transport import Transport, sent
from lorapar_ray.grpo.asking import answer_from


class Publisher:
    """Publishes one policy at a time; before the policy changes, the last one must be verified."""

    def __init__(self, coordinator: Any, transport: Transport) -> None:
        self._coordinator, self._transport = coordinator, transport
        self._answer: Any = None
        self.figures: dict[str, float] = {}
        """The coordinator's figures for the last verified policy, and the time that this process waited for it."""

    def publish(self, policy: Policy, canaries: Sequence[Canary]) -> None:
        """Start publishing a policy; the coordinator gets only its reference and digest."""
        note = note_of(policy, sent(policy, self._transport))
        self._answer = self._coordinator.publish.remote(note, list(canaries))

    def wait(self) -> None:
        """Wait until every engine's policy is verified.

        Raises:
            PolicyMismatch: one of them does not serve it.
        """
        start = time.monotonic()
        self.figures = answer_from(self._coordinator, self._answer)
        self.figures["seconds/wait_for_proof"] = time.monotonic() - start
