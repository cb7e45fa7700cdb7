"""Whether base + s·BA can be computed from a model's files: by names alone, without torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from lorapar_ray.models import model_folder, resolve_model

PREFIX = "base_model.model."
"""Of an adapter's keys, before the module's name."""


def base_name(key: str) -> str:
    """Checkpoint name of the base weight that an adapter key adapts."""
    return key.removeprefix(PREFIX).replace(".lora_A.", ".").replace(".lora_B.", ".")


def unmergeable(model: str, adapter_keys: Iterable[str]) -> list[str]:
    """`missing_from` for a model on a machine that has it; empty if it must first be downloaded from the hub."""
    from safetensors import safe_open

    folder = Path(resolve_model(model))
    if not folder.is_dir():
        return []
    names: list[str] = []
    for file in model_folder(str(folder)).glob("*.safetensors"):
        names += safe_open(file, framework="np").keys()
    return missing_from(names, adapter_keys)


def missing_from(names: Iterable[str], adapter_keys: Iterable[str]) -> list[str]:
    """Adapted weights that the checkpoint does not have under the adapter's name.

    Wrapped models (a language model inside a multimodal one) and those that transformers converts while loading have
    module names that differ from the names in their files; base + s·BA cannot be computed for them.
    """
    return sorted({base_name(key) for key in adapter_keys} - set(names))


def not_in_the_files(missing: Sequence[str], model: str) -> str:
    """One line about weights that cannot be merged."""
    return (
        f"grpo.sync: merged computes base + s·BA from the files of '{model}', which do not hold '{missing[0]}'"
        f"{f' and {len(missing) - 1} more' if len(missing) > 1 else ''} under the adapter's name for it; "
        "set grpo.sync: adapter"
    )
