"""The base model's tensors by checkpoint name, from which every merged policy is computed.

On a CPU they are read from memory-mapped files, without a copy. On a GPU they are read once and kept: on the GPU if
they are small compared with its free memory, else in pinned host memory, so that a sync reads no file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from lorapar_ray.adapters.merge import base_name
from lorapar_ray.models import model_folder, resolve_model

RESIDENT_SHARE = 0.1
"""Share of a GPU's free memory for a resident copy of the adapted weights; larger copies are pinned."""


class BaseWeights(Mapping[str, Tensor]):
    """Read from the model's files when asked for."""

    def __init__(self, model: Path) -> None:
        """`model`: a directory, or a hub name whose files have been downloaded already."""
        self._files = {}
        for file in sorted(model_folder(str(model)).glob("*.safetensors")):
            opened = safe_open(file, framework="pt")
            self._files.update(dict.fromkeys(opened.keys(), opened))

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


class KeptWeights(Mapping[str, Tensor]):
    """Base weights cached for `device`: each is read once from its file, at first use."""

    def __init__(self, files: Mapping[str, Tensor], device: torch.device, *, resident: bool) -> None:
        """`resident`: keep them on the device; else in pinned host memory, copied from there each time."""
        self._files = files
        self._device = device
        self._resident = resident
        self._kept: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._kept:
            read = self._files[name]
            self._kept[name] = read.to(self._device) if self._resident else _pinned(read)
        return self._kept[name].to(self._device, non_blocking=True)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def kept_on(files: Mapping[str, Tensor], names: Iterable[str], device: torch.device) -> KeptWeights:
    """The base for policies that adapt `names`, on a GPU."""
    size = sum(files[name].nbytes for name in names)
    free, _ = torch.cuda.mem_get_info(device)
    return KeptWeights(files, device, resident=size <= RESIDENT_SHARE * free)


def unmergeable(model: str, adapter_keys: Iterable[str]) -> list[str]:
    """`missing_from` for a model on a machine that has it; empty if it must first be downloaded from the hub."""
    folder = Path(resolve_model(model))
    return missing_from(BaseWeights(folder), adapter_keys) if folder.is_dir() else []


def not_in_the_files(missing: Sequence[str], model: str) -> str:
    """One line about weights that cannot be merged."""
    return (
        f"grpo.sync: merged computes base + s·BA from the files of '{model}', which do not hold '{missing[0]}'"
        f"{f' and {len(missing) - 1} more' if len(missing) > 1 else ''} under the adapter's name for it; "
        "set grpo.sync: adapter"
    )


def missing_from(names: Iterable[str], adapter_keys: Iterable[str]) -> list[str]:
    """Adapted weights that the checkpoint does not have under the adapter's name.

    Wrapped models (a language model inside a multimodal one) and those that transformers converts while loading have
    module names that differ from the names in their files; base + s·BA cannot be computed for them.
    """
    return sorted({base_name(key) for key in adapter_keys} - set(names))


def _pinned(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, pin_memory=True).copy_(tensor)
