"""The student: the base model, and which adapter belongs to which stage of a run."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

from lorapar_ray.config import Config, ModelConfig
from lorapar_ray.errors import UserError
from lorapar_ray.heavy_imports import import_peft
from lorapar_ray.models import loading, model_reference, resolve_model
from lorapar_ray.precision import torch_dtype
from lorapar_ray.runs import RunDirectory

RESIDUAL_INITS = ("pissa", "pissa_fast", "olora")
"""Inits that move part of the base weights into the adapter: they train against a residual base."""


def base_reference(model: ModelConfig, run: RunDirectory) -> str:
    """The base that the run's adapters are relative to: the residual base of a PiSSA or OLoRA run, else the model.

    It is a hub name, a package or a directory, which `load_base` and `load_tokenizer` resolve on their machine.
    """
    residual = run.adapter / "base"
    return run.address(residual) if residual.is_dir() else model_reference(model.path)


def load_base(model: ModelConfig, path: str, on: Any = None) -> Any:
    """The frozen base model in the config's dtype.

    Args:
        model: dtype, attention, quantisation and trust settings.
        path: as `base_reference` gives it; it is resolved on this machine.
        on: the torch.device to load onto; None: the one Ray gave this process.

    Raises:
        UserError: the model cannot be loaded, or `model.quantization` without bitsandbytes.
    """
    import_peft()  # an adapter is attached next
    from transformers import AutoModelForCausalLM

    path = resolve_model(path)
    options: dict[str, Any] = {}
    if model.quantization is not None:
        options = {"quantization_config": _quantization(model), "device_map": {"": on or device()}}
    with loading(path):
        base = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch_dtype(model.dtype, device()),
            attn_implementation=attention_of(model, device()),
            trust_remote_code=model.trust_remote_code,
            use_safetensors=True,
            **options,
        )
        if not options:
            return base.to(on or device())
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes' packed CPU kernel always computes in bfloat16, and gives no gradient.
            module.support_avx512bf16_for_cpu = False
    return base


def attention_of(model: ModelConfig, on: Any) -> str:
    """`model.attention`, with `auto` decided for the device `on`."""
    if model.attention != "auto":
        return model.attention
    return "sdpa" if on.type == "cuda" else "eager"


def _quantization(model: ModelConfig) -> Any:
    """The settings of QLoRA (arXiv 2305.14314, section 3): normal-float 4 with quantised constants."""
    from importlib.util import find_spec

    from transformers import BitsAndBytesConfig

    if find_spec("bitsandbytes") is None:
        raise UserError("model.quantization: nf4 needs bitsandbytes; pip install bitsandbytes")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=model.quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch_dtype(model.dtype, device()),
    )


def device() -> Any:
    """The device Ray gave this worker: its GPU, or the CPU."""
    import ray.train
    import torch
    from ray.train.torch import get_device

    if not torch.cuda.is_available():
        return torch.device("cpu")
    try:
        ray.train.get_context().get_world_rank()
    except RuntimeError:  # not inside a training worker
        return torch.device("cuda")
    return get_device()


def free_model_memory() -> None:
    """Give a GPU the memory of models that nothing refers to any more, before another one is loaded."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def load_tokenizer(path: str, model: ModelConfig) -> Any:
    """The student's tokenizer; it pads with its end-of-sequence token if it has no other."""
    from lorapar_ray.datasets.chat import load_encoder

    return load_encoder(resolve_model(path), None, model.trust_remote_code).tokenizer


def starting_adapter(config: Config, run: RunDirectory, stage: str) -> Path:
    """The adapter that `stage` starts from, relative to `base_reference`: the one before it in `order` left it.

    For a residual base a stage's own is `<stage>/trained`, since `<stage>/adapter` is exported for the original base.
    """
    place = config.order.index(stage) if stage in config.order else 0  # type: ignore[arg-type]
    if place == 0:
        return run.adapter
    folder = run.trained(config.order[place - 1])
    trained = folder / "trained"
    return trained if trained.is_dir() else folder / "adapter"
