"""The order in which prompts are sampled, and the position in it."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

UNKNOWN = 0.5
"""Solve rate assumed for a prompt that was never sampled."""


@dataclass
class PromptStream:
    """An endless, seeded, reshuffled stream of `count` prompts that can be checkpointed at any time.

    Every epoch takes each prompt once. With `by_solve_rate` the epoch begins with prompts with a solve rate near one
    half (largest reward variance), and ends with those solved always or never.

    Prompts are handed out before they are trained on. A checkpoint taken after step s therefore lists the prompts that
    later steps had already drawn, so that a resumed run draws those first: no prompt is lost or trained twice.
    """

    count: int
    seed: int
    by_solve_rate: bool = False
    position: int = 0
    returned: list[int] = field(default_factory=list)
    rates: dict[int, float] = field(default_factory=dict)
    """Solve rate by prompt, as last observed."""
    order: list[int] = field(default_factory=list)
    """The running epoch's."""

    def take(self, k: int) -> list[int]:
        """The next k prompt indices."""
        taken, self.returned = self.returned[:k], self.returned[k:]
        while len(taken) < k:
            epoch, offset = divmod(self.position, self.count)
            if offset == 0 or not self.order:
                self.order = self._order(epoch)
            taken.append(self.order[offset])
            self.position += 1
        return taken

    def observe(self, index: int, solved: float) -> None:
        """Note a prompt's solve rate, in [0, 1]; it counts from the next epoch on."""
        if self.by_solve_rate:
            self.rates[index] = solved

    def state(self, drawn_but_untrained: list[int]) -> dict[str, Any]:
        """JSON-ready state of a stream to which the given prompts are handed back."""
        return {
            "position": self.position,
            "returned": [*drawn_but_untrained, *self.returned],
            "rates": sorted(self.rates.items()),
            "order": self.order if self.by_solve_rate else [],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        self.position = state["position"]
        self.returned = list(state["returned"])
        self.rates = dict(state["rates"])
        self.order = list(state["order"])

    def _order(self, epoch: int) -> list[int]:
        order = list(range(self.count))
        random.Random(f"{self.seed}/prompts/{epoch}").shuffle(order)
        if self.by_solve_rate:
            order.sort(key=lambda index: abs(self.rates.get(index, UNKNOWN) - UNKNOWN))  # stable: ties stay shuffled
        return order
