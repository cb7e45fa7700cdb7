"""Resolves `dtype: auto` on the machine that computes.

A CPU that cannot multiply bfloat16 numbers (x86 without AVX-512, as in many laptops) emulates it, a hundred times
slower than float32 (0.9 and 110 GFLOPS on two cores of such an AMD EPYC). Everywhere else bfloat16 halves memory and
traffic.
"""

from __future__ import annotations

from typing import Any

from lorapar_ray.errors import UserError


def torch_dtype(dtype: str, device: Any) -> Any:
    """A config's `dtype` as a torch.dtype, for computing on `device` (a torch.device)."""
    import torch

    if dtype == "auto":
        native = torch.cuda.is_bf16_supported(False) if device.type == "cuda" else cpu_has_bfloat16()
        return torch.bfloat16 if native else torch.float32
    return getattr(torch, dtype)


def require_trainable(dtype: str) -> None:
    """Refuse to train a float16 model: most gradients would be 0, since nothing scales the loss.

    A loss is divided by the tokens of a step before it is differentiated, and float16 holds nothing below 6e-8.

    Raises:
        UserError: names the field and what to choose.
    """
    if dtype == "float16":
        raise UserError(
            "model.dtype: float16 has too small a range to train in without scaling the loss; choose bfloat16, or "
            "float32 on a GPU without it (auto does); engines may compute in float16 (their own `dtype`)"
        )


def engine_dtype() -> str:
    """`auto` for a vLLM engine on this machine; asks vLLM, since touching a GPU here would keep vLLM from forking."""
    import torch
    from vllm.platforms import current_platform

    native = cpu_has_bfloat16() if current_platform.is_cpu() else torch.bfloat16 in current_platform.supported_dtypes
    return "bfloat16" if native else "float32"


def cpu_has_bfloat16() -> bool:
    """Whether torch's matrix products on this CPU compute in bfloat16 instead of emulating it."""
    import torch

    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def use_tensor_cores(device: Any, dtype: Any) -> None:
    """Let a GPU multiply float32 matrices as TF32 in this process, if the model has 16 bits.

    There only the LoRA's own products are float32, and TF32 rounds less (2⁻¹¹) than the activations around them
    (bfloat16: 2⁻⁹). A model that is float32 keeps exact products.
    """
    import torch

    if device.type == "cuda" and dtype != torch.float32:
        torch.set_float32_matmul_precision("high")


def rounding(dtype: Any) -> float:
    """The gap in log-probabilities (nats, mean) that a model's dtype alone may leave between learner and engine."""
    import torch

    return 0.01 if dtype == torch.float32 else 0.2
