"""What some models do to each logit after the head: a scale (Cohere, Granite) or a soft cap (Gemma).

The head can then apply it to a slice of the logits at a time, with its derivative, so all logits need not exist.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

SCALES: Mapping[str, int] = {"logit_scale": 1, "lm_head_multiplier": 1, "logits_scaling": -1}
"""Fields of model configs whose value, to this power, the logits are multiplied by. Not in every model: MiniCPM3 scales
the head's input by `logits_scaling`, and HyperCLOVA X multiplies by it."""
CAP = "final_logit_softcapping"
PROBES = (-300.0, -60.0, -9.0, -1.0, -0.01, 0.0, 0.3, 4.0, 25.0, 100.0)
"""Logits that show what a model does to all logits."""


@dataclass(frozen=True)
class LogitTransform:
    """z ↦ scale · z, or cap · tanh(scale · z / cap); the distribution is of that over the temperature."""

    scale: float = 1.0
    cap: float | None = None
    temperature: float = 1.0

    def apply_(self, logits: Tensor) -> Tensor:
        """The tempered logits, in place of the head's."""
        if self.cap is None:
            return logits if self.slope == 1.0 else logits.div_(self.temperature / self.scale)
        return logits.div_(self.cap / self.scale).tanh_().mul_(self.cap / self.temperature)

    @property
    def slope(self) -> float:
        """Their derivative at 0."""
        return self.scale / self.temperature

    def relative_slope_(self, logits: Tensor) -> Tensor | None:
        """Their derivative over `slope`, in place of the result of `apply_`; None: 1 everywhere."""
        return None if self.cap is None else logits.mul_(self.temperature / self.cap).square_().neg_().add_(1.0)

    def alternatives(self) -> tuple[LogitTransform, ...]:
        """What a model may do instead that has this in its config: nothing, or the inverse scale."""
        return NO_CHANGE, replace(self, scale=1.0), replace(self, scale=1.0 / self.scale)

    def explains(self, found: Tensor) -> bool:
        """Whether a model that made `found` [..., PROBES] of the logits `PROBES` applies this, at temperature 1."""
        expected = self.apply_(torch.tensor(PROBES, device=found.device)).expand_as(found)
        return bool(torch.isclose(found.float(), expected, rtol=1e-4, atol=1e-6).all())


NO_CHANGE = LogitTransform()


def logit_transform(model: Any) -> LogitTransform:
    """What the model's config says; whether the model does that is seen from `PROBES`."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = base.config.get_text_config()
    scale = 1.0
    for name, power in SCALES.items():
        value = _number(config, name)
        scale *= 1.0 if value is None else value**power
    return LogitTransform(scale, _number(config, CAP))


def names_a_transform(model: Any) -> bool:
    """Whether the model's config has such a field, even one that changes nothing."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = base.config.get_text_config()
    return any(_number(config, name) is not None for name in (*SCALES, CAP))


def _number(config: Any, name: str) -> float | None:
    value = getattr(config, name, None)
    return float(value) if isinstance(value, int | float) and value else None
