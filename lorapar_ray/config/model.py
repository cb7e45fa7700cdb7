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
    """Dtype of the frozen base; the adapter is float32."""
    trust_remote_code: Result[bool] = False
    """Run Python code that comes with the model."""
    system_prompt: Result[str | None] = None
    """Added to every chat without a system message; "" adds an empty one. None: add nothing."""
    attention: Operation[Literal["auto", "sdpa", "eager", "flash_attention_2"]] = "sdpa"
    """`auto`: `sdpa` on a GPU and `eager` on a CPU, where it is faster for rows of a few hundred tokens."""
    quantization: Result[Literal["nf4"] | None] = None
    """Quantize the frozen base to 4 bits for scoring and training (QLoRA); needs bitsandbytes. Engines use `dtype`."""


class AdapterConfig(Section):
    """The LoRA adapter that is scored, cut and trained, or another PEFT method as a baseline."""

    method: Result[Literal["lora", "prompt_tuning", "p_tuning", "prefix_tuning", "ia3"]] = "lora"
    """All but `lora` are baselines of stage 1: they have no elements to partition, and vLLM does not serve them, so
    they are evaluated with transformers. `rank` and all fields below it apply to `lora` only."""
    virtual_tokens: Result[PositiveInt] = 20
    """Length of the learnt prompt or prefix."""
    rank: Result[PositiveInt] = 8
    """LoRA's rank r."""
    alpha: Result[PositiveFloat] = 16.0
    """LoRA's scaling is alpha / rank."""
    dropout: Result[Annotated[float, Field(ge=0, lt=1)]] = 0.0
    """Dropout on LoRA's input in training."""
    targets: Result[Literal["qkv", "gud", "qkvgud"] | Annotated[Distinct[str], Field(min_length=1)]] = "qkvgud"
    """Linear layers with LoRA: query, key and value (`qkv`), gate, up and down (`gud`), both, or your own list of
    names."""
    init: Result[Literal["default", "gaussian", "pissa", "pissa_fast", "olora", "adapter"]] = "default"
    """`default`: B = 0. `gaussian`: A and B drawn from N(0, `init_std`²), as the authors do. `pissa`, `pissa_fast`
    (randomised SVD) and `olora` move a part of the base into the adapter. `adapter`: the LoRA at `path`."""
    path: Result[str | None] = None
    """For init: adapter: the directory of a LoRA adapter to start from; its own rank, alpha and targets are used."""
    init_std: Result[PositiveFloat] = 0.01
    """Standard deviation, for init: gaussian."""
    warmup_steps: Result[Optional0] = 8
    """For init: default (B = 0): SFT steps on both Systems before scoring; without them every score is zero."""
    warmup_learning_rate: Result[PositiveFloat] = 5e-4
    """Constant learning rate of the `warmup_steps`."""

    @model_validator(mode="after")
    def _path_belongs_to_its_init(self) -> AdapterConfig:
        if (self.init == "adapter") != (self.path is not None):
            raise ValueError("path: required for init: adapter, and not allowed for other values")
        return self
