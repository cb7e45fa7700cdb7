"""Stages `score` and `partition`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lorapar_ray.config.base import Fraction, PositiveInt, Section
from lorapar_ray.config.engine import Resources
from lorapar_ray.config.marks import Operation, Result


class ScoreConfig(Section):
    """Stage `score`: importance of every LoRA element for each System (paper, section 3.2)."""

    criterion: Result[Literal["taylor2", "taylor1", "fisher", "magnitude", "random"]] = "taylor2"
    """`taylor2`: |g·φ − ½·F·φ²|, the paper's. `taylor1`: |g·φ|. `fisher`: F·φ². `magnitude`: |φ|. `random`: drawn."""
    examples_per_system: Result[PositiveInt | None] = 100
    """None: every labelled row."""
    batch_tokens: Operation[PositiveInt | None] = None
    """Tokens per forward pass; None: 2048 on a CPU, 4096 on a GPU. Memory grows with it, and on a GPU speed."""
    batch_size: Operation[PositiveInt | None] = None
    """At most so many examples per forward pass; None: as many as `batch_tokens` hold."""
    unit_size: Operation[PositiveInt] = 16
    """Examples that are dealt to a worker at once, and counted as one when a run is resumed."""
    checkpoint_every_s: Operation[Annotated[float, Field(ge=0)]] = 60.0
    """Seconds between two writings of a worker's sums; what is not written yet is computed again after a kill. 0: after
    every batch of units."""
    max_length: Result[PositiveInt] = 512
    """Tokens of an example; a longer response is cut."""
    gradient_checkpointing: Operation[bool] = False
    """Compute activations again in the backward pass: less memory, more time."""
    workers: Operation[PositiveInt] = 1
    """Training workers that share the examples."""
    sharding: Operation[Literal["none", "fsdp2"]] = "none"
    """`fsdp2`: cut the frozen base over the workers, for a base that does not fit one device."""
    resources: Operation[Resources] = Resources()
    """Of one worker."""


class PartitionConfig(Section):
    """Stage `partition`: threshold θ and activation fractions α, β (paper, section 3.3)."""

    theta: Result[Annotated[float, Field(gt=0, le=1)]] = 0.9
    """Share of a System's total importance that its kept set carries."""
    alpha: Result[Fraction] = 1.0
    """Share of the elements kept for both Systems that stage 1 trains."""
    beta: Result[Fraction] = 1.0
    """Share of the elements kept for both Systems that stage 2 trains."""
    activation: Result[Literal["importance", "random"]] = "importance"
    """Which elements of the shared part `alpha` and `beta` take: the most important ones, or drawn ones."""
    scope: Result[Literal["global", "module_type", "layer"]] = "global"
    """What is ranked together: all elements, those of each module type, or those of each layer."""
    mask: Result[Literal["importance", "random", "swapped"]] = "importance"
    """`random`: sets of the same sizes drawn at random, the paper's baseline. `swapped`: each stage gets what the other
    System needs, a control."""
