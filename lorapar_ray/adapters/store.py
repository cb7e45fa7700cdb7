"""Adapters on disk: stock PEFT directories, each written atomically."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lorapar_ray.adapters.keys import adapter_parameters, adapter_state
from lorapar_ray.boundary import boundary, read_tensors
from lorapar_ray.errors import UserError
from lorapar_ray.files import atomic_path

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def save_adapter(peft_model: Any, folder: Path) -> None:
    """Save the adapter like PEFT, in float32.

    `init_lora_weights` is written as true, so that loading never repeats an SVD of the base.
    """
    settings = _plain(peft_model.peft_config["default"].to_dict())
    write_adapter_state(folder, settings, adapter_state(peft_model))


def write_adapter_state(folder: Path, settings: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Write an adapter directory from its config (as in `adapter_config.json`) and tensors.

    Raises:
        UserError: a number of it is not finite; nothing is written.
    """
    require_finite(folder, state)
    with atomic_path(folder) as draft:
        draft.mkdir()
        save_file({key: state[key].contiguous() for key in sorted(state)}, draft / WEIGHTS, metadata={"format": "pt"})
        text = json.dumps({**settings, "init_lora_weights": True, "inference_mode": True}, indent=2, sort_keys=True)
        (draft / CONFIG).write_text(text + "\n", encoding="utf-8")


def require_finite(folder: Path, state: Mapping[str, Tensor]) -> None:
    """Check what is going to be saved to `folder`.

    Raises:
        UserError: a number of it is not finite.
    """
    for key, value in state.items():
        if not bool(torch.isfinite(value).all()):
            raise UserError(
                f"'{folder}' is not written: '{key}' holds numbers that are not finite; lower the stage's learning rate"
            )


def read_adapter_state(folder: Path) -> dict[str, Tensor]:
    """The adapter's tensors by key.

    Raises:
        UserError: there is no adapter.
    """
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"'{folder}' holds no {WEIGHTS}; run the stage that writes it, or check the path")
    return read_tensors(folder / WEIGHTS)


def load_adapter(base_model: Any, folder: Path) -> Any:
    """`base_model` as a PeftModel with the adapter of `folder`, weights in float32.

    Raises:
        UserError: there is no adapter, or it lacks some of the model's elements (PEFT would draw them at random).
    """
    from peft import PeftModel

    state = read_adapter_state(folder)
    with boundary(f"adapter '{folder}' cannot be put on this model", "check that it was made for it"):
        peft_model = PeftModel.from_pretrained(base_model, str(folder), is_trainable=True)
    parameters = adapter_parameters(peft_model)
    missing = [key for key in parameters if key not in state]
    if missing:
        raise UserError(f"'{folder / WEIGHTS}' lacks {len(missing)} tensors, '{missing[0]}' first; save it again")
    for parameter in parameters.values():
        parameter.data = parameter.data.float()
    return peft_model


def _plain(value: Any) -> Any:
    """JSON-ready form of PEFT's config: sets become sorted lists, enums their values."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return (
        value if value is None or isinstance(value, str | int | float | bool) else getattr(value, "value", str(value))
    )
