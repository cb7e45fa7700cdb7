"""Stages `score` and `partition`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lorapar_ray.config.base import Fraction, PositiveInt, Section
from lorapar_ray.config.engine import Resources, require_apart
from lorapar_ray.config.marks import Operation, Result
from lorapar_ray.config.ranges import NumberOrRange, Ranged, require_no_range_by_node


class ScoreConfig(Ranged):
    """Stage `score`: importance of every LoRA element for each System (paper, section 3.2)."""

    criterion: Result[Literal["taylor2", "taylor1", "fisher", "magnitude", "random"]] = "taylor2"
    """`taylor2`: |g·φ − ½·F·φ²|, as in the paper. `taylor1`: |g·φ|. `fisher`: F·φ². `magnitude`: |φ|. `random`: random
    numbers."""
    examples_per_system: Result[PositiveInt | None] = 100
    """Scored examples per System; None: every labelled row."""
    batch_tokens: Operation[PositiveInt | None] = None
    """Tokens per forward pass; None: 2048 on a CPU, 4096 on a GPU. A larger number needs more memory, and is faster on
    a GPU."""
    batch_size: Operation[PositiveInt | None] = None
    """At most this many examples per forward pass; None: as many as fit into `batch_tokens`."""
    unit_size: Operation[PositiveInt] = 16
    """Examples in one unit of work: a worker gets whole units, and a resumed run skips finished units. Scoring that has
    begun keeps the size that it began with."""
    checkpoint_every_s: Operation[Annotated[float, Field(ge=0)]] = 60.0
    """Seconds between two checkpoints of a worker's sums; after a kill, examples since the last one are computed again.
    0: checkpoint after every batch of units."""
    max_length: Result[PositiveInt] = 512
    """Longest example, in tokens; a longer response is cut."""
    gradient_checkpointing: Operation[bool] = False
    """Recompute activations in the backward pass: less memory, more time."""
    workers: Operation[NumberOrRange] = 1
    """Training workers that share the examples. A range, `[1, 8]`: as many as the cluster has room for; when nodes come
    or go, the stage resumes from its last checkpoint with more or fewer workers."""
    max_workers: Operation[PositiveInt | None] = None
    """The most workers, where `workers` is not a list: an older spelling of a range."""
    sharding: Operation[Literal["none", "fsdp2", "hsdp"]] = "none"
    """Cut the frozen base, if it does not fit one device: `fsdp2` over all workers, `hsdp` over those of each node."""
    resources: Operation[Resources] = Resources()
    """Resources of one worker."""

    @model_validator(mode="after")
    def _workers_fit_sharding(self) -> ScoreConfig:
        require_no_range_by_node("workers", self.max_workers, self.sharding)
        require_apart("workers", self.max_workers or self.workers, "resources", self.resources.gpu_count)
        return self


class PartitionConfig(Section):
    """Stage `partition`: threshold θ and activation fractions α, β (paper, section 3.3)."""

    theta: Result[Annotated[float, Field(gt=0, le=1)]] = 0.9
    """Share of a System's total importance that its kept set must reach."""
    alpha: Result[Fraction] = 1.0
    """Share of the elements kept for both Systems that stage 1 trains."""
    beta: Result[Fraction] = 1.0
    """Share of the elements kept for both Systems that stage 2 trains."""
    activation: Result[Literal["importance", "random"]] = "importance"
    """How `alpha` and `beta` choose elements of the shared part: the most important ones, or random ones."""
    scope: Result[Literal["global", "module_type", "layer"]] = "global"
    """Elements that are ranked together: all, those of each module type, or those of each layer."""
    mask: Result[Literal["importance", "random", "swapped"]] = "importance"
    """`random`: random sets of the same sizes, the paper's baseline. `swapped`: each stage gets the other System's
    elements, a control."""
    regions: Result[Literal["stages", "own", "disjoint"]] = "stages"
    """`stages`: a region for each of the two training stages, by `alpha` and `beta`, as in the paper. `own` and
    `disjoint`: a region for each System of `label.definitions`, for SFT alone (`order: [sft]`), which trains the
    regions of `sft.systems`; all these Systems are scored. `own`: what θ keeps for the System. `disjoint`: an element
    kept for several Systems goes to the one for which it is most important, by its share of the System's whole
    importance."""

    @model_validator(mode="after")
    def _swapped_has_two_stages(self) -> PartitionConfig:
        if self.mask == "swapped" and self.regions != "stages":
            raise ValueError(
                f"mask: swapped exchanges the regions of two stages; set regions to stages, not {self.regions}"
            )
        return self
