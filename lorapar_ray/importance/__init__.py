"""Importance of every LoRA parameter, from exact per-example gradients."""

from typing import TYPE_CHECKING

from lorapar_ray.lazy import exports

if TYPE_CHECKING:
    from lorapar_ray.importance.batching import TokenizedExample, by_cost, collate, pack
    from lorapar_ray.importance.capture import example_losses, gradient_sums
    from lorapar_ray.importance.criteria import score
    from lorapar_ray.importance.sums import GradSums

__all__ = [
    "GradSums",
    "TokenizedExample",
    "by_cost",
    "collate",
    "example_losses",
    "gradient_sums",
    "pack",
    "score",
]

__getattr__ = exports(
    __name__,
    {
        "batching": ("TokenizedExample", "by_cost", "collate", "pack"),
        "capture": ("example_losses", "gradient_sums"),
        "criteria": ("score",),
        "sums": ("GradSums",),
    },
)
