"""The linear layers with an adapter, for any decoder, and functions that parse an adapter key."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from lorapar_ray.errors import UserError

ATTENTION_TYPES = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "qkv_proj": "qkv", "query_key_value": "qkv"}
MLP_TYPES = {
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    "gate_up_proj": "gate_up",
    "dense_h_to_4h": "up",
    "dense_4h_to_h": "down",
}
SPECS = {"qkv": ATTENTION_TYPES, "gud": MLP_TYPES, "qkvgud": ATTENTION_TYPES | MLP_TYPES}
_LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")


def resolve_targets(model: nn.Module, spec: str | Sequence[str]) -> list[str]:
    """Full names of the linear layers that `spec` means in `model`, in the model's order.

    Args:
        spec: `qkv`, `gud` or `qkvgud` (paper, section 4), or layer names or their last parts. Fused projections
            (Phi-3's qkv_proj and gate_up_proj, GPT-NeoX's query_key_value) stand for the parts they fuse. Experts
            packed into one 3-D parameter are not linear layers and get no adapter; a warning says so.

    Raises:
        UserError: the model has none of them; the message lists the linear layers it has.
    """
    wanted = list(SPECS[spec]) if isinstance(spec, str) and spec in SPECS else [spec] if isinstance(spec, str) else spec
    linear = [name for name, module in model.named_modules() if _is_linear(module) and name != "lm_head"]
    found = [name for name in linear if _means(wanted, name)]
    packed = [name for name, value in model.named_parameters() if value.ndim == 3 and _means(wanted, name)]
    if found and packed:
        warnings.warn(
            f"{len(packed)} tensors of {type(model).__name__} hold packed experts and get no adapter, for example "
            f"'{packed[0]}'; only the other layers are tuned",
            stacklevel=2,
        )
    if not found:
        endings = sorted({name.rsplit(".", 1)[-1] for name in linear}) or ["none"]
        asked = spec if isinstance(spec, str) else ", ".join(spec)
        raise UserError(
            f"adapter.targets '{asked}' matches no layer of {type(model).__name__}; its linear layers are "
            + ", ".join(endings)
        )
    return found


def module_type(key: str) -> str:
    """q, k, v, qkv, gate, up, gate_up or down; for other layers the last part of their name."""
    name = _module_name(key).rsplit(".", 1)[-1]
    return (ATTENTION_TYPES | MLP_TYPES).get(name, name)


def layer_index(key: str) -> int | None:
    """Number of the decoder layer that an adapter key belongs to; None outside the layers."""
    match = _LAYER.search(key)
    return int(match.group(1)) if match else None


def matrix(key: str) -> Literal["A", "B"]:
    """Which of the two LoRA matrices an adapter key names."""
    return "A" if ".lora_A." in key else "B"


def _means(wanted: Sequence[str], name: str) -> bool:
    return any(name == want or name.endswith(f".{want}") for want in wanted)


def _module_name(key: str) -> str:
    return re.split(r"\.lora_[AB]\.", key)[0]


def _is_linear(module: Any) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ in ("Linear4bit", "Linear8bitLt")
