"""Stage `sft`, and the settings of the warm-up before scoring."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lorapar_ray.config.base import (
    Betas,
    Distinct,
    Fraction,
    NonNegative,
    PositiveFloat,
    PositiveInt,
    System,
    Tracker,
)
from lorapar_ray.config.engine import Resources, require_apart
from lorapar_ray.config.marks import Operation, Result
from lorapar_ray.config.model import AdapterConfig
from lorapar_ray.config.ranges import NumberOrRange, Ranged, require_no_range_by_node


class SftConfig(Ranged):
    """Stage 1: supervised fine-tuning of the System 1 region on System 1 rows."""

    systems: Result[Annotated[Distinct[System], Field(min_length=1)]] = [1]
    """Systems whose rows are trained on."""
    sequence: Result[bool] = False
    """Train `systems` one after the other, in this order: each on its own rows, from the adapter before, and in its own
    region (`partition.regions: own` or `disjoint`), or with `masked: false` every element. False: all rows together."""
    masked: Result[bool] = True
    """Train only the stage's region; False: every element trains, which is plain LoRA (or PiSSA, OLoRA, ... by
    `adapter.init`)."""
    epochs: Result[PositiveFloat] = 1.0
    """Passes over the rows."""
    max_steps: Result[PositiveInt | None] = None
    """Stop after this many optimiser steps; None: after `epochs`."""
    batch_size: Result[PositiveInt] = 32
    """Examples per optimiser step over all workers."""
    micro_batch_size: Operation[PositiveInt] = 8
    """Examples in one forward and backward pass of a worker."""
    learning_rate: Result[PositiveFloat] = 2e-4
    """Highest learning rate, after the warm-up."""
    lora_plus_ratio: Result[PositiveFloat] = 1.0
    """Learning rate of the B matrices over that of the A matrices (LoRA+)."""
    schedule: Result[Literal["cosine", "linear", "constant"]] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup_ratio: Result[Fraction] = 0.03
    """Share of the steps in which the learning rate rises."""
    weight_decay: Result[NonNegative] = 0.0
    """Decoupled weight decay (AdamW) of the trained elements."""
    betas: Result[Betas] = (0.9, 0.999)
    """Betas of AdamW's two moments."""
    max_grad_norm: Result[PositiveFloat] = 1.0
    """The gradient of the trained elements is clipped to this norm."""
    nonfinite_limit: Operation[PositiveInt] = 3
    """Steps in a row that may be skipped because the gradient is not finite; then the run stops."""
    max_length: Result[PositiveInt] = 512
    """Longest example, in tokens; a longer response is cut."""
    packing: Operation[bool] = False
    """Concatenate a step's examples into rows of `max_length` tokens; each example attends only to itself. No padding
    is computed; loss and gradient are the same."""
    length_bucketing: Result[bool] = False
    """Draw a step's examples from those of similar length, for less padding. (Within a step they are always sorted by
    length.)"""
    gradient_checkpointing: Operation[bool] = False
    """Recompute activations in the backward pass: less memory, more time."""
    acceleration: Operation[Literal["auto", "none", "graphs", "compile"]] = "auto"
    """How a step runs on a GPU. `none`: one kernel launch per operation. `graphs`: one CUDA graph per bucket of
    lengths, which removes most launch overhead of a small model; rows are padded up to its length. `compile`:
    graphs of compiled layers; compiling takes a minute. `auto`: graphs, compiled if the job is long enough. On a
    CPU, and with gradient checkpointing, a sharded or a 4-bit base, it is always `none`; arms that train together
    are never compiled. Graphs store activations twice: where the memory is too small for that, they are dropped
    with a warning, and the rest runs as with `none`."""
    checkpoint_every: Operation[PositiveInt] = 50
    """Steps between two checkpoints."""
    validation: Result[Annotated[float, Field(ge=0, lt=1)]] = 0.0
    """Share of the rows that is held out from training for the validation loss; 0: none."""
    validate_every: Result[PositiveInt] = 20
    """Steps between two validations; with a validation split, checkpoints are written at the same steps."""
    patience: Result[PositiveInt | None] = None
    """Stop after this many validations in a row without a lower loss; None: never."""
    keep: Result[Literal["best", "last"]] = "best"
    """With a validation split: the adapter of the lowest validation loss, or of the last step."""
    arms_at_once: Operation[PositiveInt] = 4
    """In a grid (`lorapar ablate`): the number of runs with equal base, rank, targets and batches that train together
    on one frozen base, each with its own rows and steps. Each ends as it does alone, except for rounding and dropout
    masks. Each needs memory for its activations. 1: one run after the other."""
    workers: Operation[NumberOrRange] = 1
    """Training workers that share each step's examples. A range, `[1, 8]`: as many as the cluster has room for; when
    nodes come or go, the stage resumes from its last checkpoint with more or fewer workers."""
    max_workers: Operation[PositiveInt | None] = None
    """The most workers, where `workers` is not a list: an older spelling of a range."""
    sharding: Operation[Literal["none", "fsdp2", "hsdp"]] = "none"
    """Cut the frozen base, if it does not fit one device: `fsdp2` over all workers, `hsdp` over those of each node."""
    resources: Operation[Resources] = Resources()
    """Resources of one worker."""
    report_to: Operation[Distinct[Tracker]] = ["tensorboard"]
    """Trackers that get the curves; TensorBoard's files are in `metrics/tensorboard`. In W&B (wandb 0.19.10 or newer)
    and MLflow each stage of each run directory has a run of its own: a resumed stage goes on in it, and `--redo` begins
    another. A tracker that fails is reported once, in a line of the command's; training goes on without its curves."""

    @property
    def parts(self) -> list[list[int]]:
        """The Systems of each part of stage 1: those that train together."""
        return [[system] for system in self.systems] if self.sequence else [list(self.systems)]

    def warmup(self, adapter: AdapterConfig) -> SftConfig:
        """The settings of the warm-up before scoring: a few steps at a constant rate."""
        settings = {
            "max_steps": adapter.warmup_steps,
            "learning_rate": adapter.warmup_learning_rate,
            "schedule": "constant",
            "warmup_ratio": 0.0,
            "checkpoint_every": 10**9,
            "validation": 0.0,
            "patience": None,
        }
        return self.model_copy(update=settings)

    @model_validator(mode="after")
    def _workers_fit_sharding(self) -> SftConfig:
        require_no_range_by_node("workers", self.max_workers, self.sharding)
        require_apart("workers", self.max_workers or self.workers, "resources", self.resources.gpu_count)
        return self

    @model_validator(mode="after")
    def _sequence_has_several(self) -> SftConfig:
        if self.sequence and len(self.systems) < 2:
            raise ValueError("sequence: needs several Systems in sft.systems, in the order of their training")
        return self

    @model_validator(mode="after")
    def _patience_needs_validation(self) -> SftConfig:
        if self.patience is not None and self.validation == 0:
            raise ValueError("patience: stopping early needs a validation split; set sft.validation above 0")
        return self
