"""The order in which prompts are sampled, and where it stands."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any


@dataclass
class PromptStream:
    """An endless, seeded, reshuffled walk over `count` prompts that can be checkpointed in mid-flight.

    Prompts are handed out before they are trained on. A checkpoint taken after step s therefore lists the prompts that
    later steps had already drawn, so that a resumed run draws those first: none is lost, none is trained twice.
    """

    count: int
    seed: int
    position: int = 0
    returned: list[int] = field(default_factory=list)

    def take(self, k: int) -> list[int]:
        """The next k prompt indices."""
        taken, self.returned = self.returned[:k], self.returned[k:]
        while len(taken) < k:
            epoch, offset = divmod(self.position, self.count)
            taken.append(_order(self.count, self.seed, epoch)[offset])
            self.position += 1
        return taken

    def state(self, drawn_but_untrained: list[int]) -> dict[str, Any]:
        """JSON-ready state of a stream to which the given prompts are handed back."""
        return {"position": self.position, "returned": [*drawn_but_untrained, *self.returned]}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        self.position = state["position"]
        self.returned = list(state["returned"])


def _order(count: int, seed: int, epoch: int) -> list[int]:
    order = list(range(count))
    random.Random(f"{seed}/prompts/{epoch}").shuffle(order)
    return order
