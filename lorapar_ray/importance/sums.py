"""Σ∂L and Σ(∂L)² over examples: the input of every importance criterion, and the result of a unit of scoring."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from lorapar_ray.boundary import damaged, read_tensors_and_metadata
from lorapar_ray.files import atomic_path

AGAIN = "delete it and run `lorapar score` again: it computes this unit once more"


@dataclass
class GradSums:
    """Sums over `n` examples, float32, by adapter key and in the shape of each parameter."""

    n: int
    first: dict[str, Tensor]
    """Σ_k ∂L_k/∂φ"""
    second: dict[str, Tensor]
    """Σ_k (∂L_k/∂φ)²"""

    @classmethod
    def zeros(cls, parameters: dict[str, Tensor]) -> GradSums:
        """No examples yet, for parameters of these shapes, on their devices."""
        first = {key: torch.zeros_like(p, dtype=torch.float32) for key, p in parameters.items()}
        return cls(0, first, {key: torch.zeros_like(value) for key, value in first.items()})

    def add(self, other: GradSums) -> None:
        """Add the sums of other examples in place."""
        self.n += other.n
        for mine, theirs in ((self.first, other.first), (self.second, other.second)):
            for key, value in mine.items():
                value += theirs[key]

    def mean(self, key: str) -> tuple[Tensor, Tensor]:
        """(g, F) of one parameter (paper, section 3.2): the mean gradient and the diagonal empirical Fisher."""
        return self.first[key] / self.n, self.second[key] / self.n

    def save(self, path: Path, **notes: str) -> None:
        """Write atomically as safetensors, with notes in its metadata."""
        tensors = {f"first.{key}": value.cpu().contiguous() for key, value in self.first.items()}
        tensors |= {f"second.{key}": value.cpu().contiguous() for key, value in self.second.items()}
        with atomic_path(path) as draft:
            save_file(tensors, draft, metadata={"n": str(self.n), **notes})

    @classmethod
    def load(cls, path: Path) -> GradSums:
        """Read what `save` wrote.

        Raises:
            UserError: the file is missing, damaged, or another one.
        """
        tensors, metadata = read_tensors_and_metadata(path, AGAIN)
        with damaged(path, AGAIN):
            n = int(metadata["n"])
            first, second = (
                {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
                for prefix in ("first.", "second.")
            )
            shapes = [{key: value.shape for key, value in part.items()} for part in (first, second)]
            if n < 1 or not first or shapes[0] != shapes[1]:
                raise ValueError("no sums of gradients and their squares")
        return cls(n, first, second)
