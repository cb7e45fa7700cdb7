"""The student and the adapter on it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lorapar_ray.config.base import Distinct, Dtype, Optional0, PositiveFloat, PositiveInt, Section
from lorapar_ray.config.marks import Operation, Result


class ModelConfig(Section):
    """The student: the model whose adapter is labelled for, scored and trained."""

    path: Result[str]
    """A directory, a hub name (owner/name), or `package:NAME` for weights that an installed Python package carries."""
    dtype: Result[Dtype] = "auto"
    """Of the frozen base; the adapter is float32."""
    trust_remote_code: Result[bool] = False
    """Run Python code that comes with the model."""
    system_prompt: Result[str | None] = None
    """The first message of every chat that has none; "" is an empty one. None: none is given."""
    attention: Operation[Literal["auto", "sdpa", "eager", "flash_attention_2"]] = "sdpa"
    """`auto`: `sdpa` on a GPU and `eager` on a CPU, where it is faster for rows of a few hundred tokens."""
    quantization: Result[Literal["nf4"] | None] = None
    """Hold the frozen base in 4 bits while scoring and training (QLoRA); needs bitsandbytes. Engines keep `dtype`."""


class AdapterConfig(Section):
    """The LoRA adapter that is scored, cut and trained, or another PEFT method as a baseline."""

    method: Result[Literal["lora", "prompt_tuning", "p_tuning", "prefix_tuning", "ia3"]] = "lora"
    """All but `lora` are baselines of stage 1: they have no elements to partition and no engine serves them, so they
    are evaluated with transformers. `targets`, `rank` and what follows belong to `lora`."""
    virtual_tokens: Result[PositiveInt] = 20
    """Length of the learnt prompt or prefix."""
    rank: Result[PositiveInt] = 8
    """r of LoRA."""
    alpha: Result[PositiveFloat] = 16.0
    """LoRA's scaling is alpha / rank."""
    dropout: Result[Annotated[float, Field(ge=0, lt=1)]] = 0.0
    """Of LoRA's input while training."""
    targets: Result[Literal["qkv", "gud", "qkvgud"] | Annotated[Distinct[str], Field(min_length=1)]] = "qkvgud"
    """Which linear layers carry LoRA: query, key and value (`qkv`), gate, up and down (`gud`), both, or names of your
    own."""
    init: Result[Literal["default", "gaussian", "pissa", "pissa_fast", "olora", "adapter"]] = "default"
    """`default`: B = 0. `gaussian`: A and B drawn from N(0, `init_std`²), the authors' way. `pissa`, `pissa_fast`
    (randomised SVD) and `olora` take a part out of the base. `adapter`: the LoRA at `path`."""
    path: Result[str | None] = None
    """For init: adapter: the directory of a LoRA adapter to go on from; its rank, alpha and targets are its own."""
    init_std: Result[PositiveFloat] = 0.01
    """For init: gaussian."""
    warmup_steps: Result[Optional0] = 8
    """For init: default (B = 0): SFT steps on both Systems before scoring, else every score would be zero."""
    warmup_learning_rate: Result[PositiveFloat] = 5e-4
    """Constant, during `warmup_steps`."""

    @model_validator(mode="after")
    def _path_belongs_to_its_init(self) -> AdapterConfig:
        if (self.init == "adapter") != (self.path is not None):
            raise ValueError("path: belongs to init: adapter, and only there")
        return self
