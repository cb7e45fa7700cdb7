"""Stage `evaluate`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lorapar_ray.config.base import Distinct, PositiveInt, Section, StopStrings
from lorapar_ray.config.engine import EngineConfig, Resources, require_gpu_for_each_rank
from lorapar_ray.config.marks import Operation, Result


class EvaluateConfig(Section):
    """Stage `evaluate`: greedy accuracy on the test rows for each named model."""

    models: Result[Annotated[Distinct[Literal["base", "sft", "grpo"]], Field(min_length=1)] | None] = None
    """None: the base and every stage of `order`."""
    answer: Result[Literal["numeric", "exact", "option_letter"]] = "numeric"
    """How an answer is compared with the reference."""
    max_new_tokens: Result[PositiveInt] = 256
    """Tokens at which an answer is cut."""
    stop: Result[StopStrings] = []
    """Strings at which an answer ends."""
    engine: Result[EngineConfig] = EngineConfig()
    resources: Operation[Resources] = Resources()
    """Of the engine."""

    @model_validator(mode="after")
    def _gpu_for_each_rank(self) -> EvaluateConfig:
        require_gpu_for_each_rank("resources", self.resources, "engine", self.engine)
        return self
