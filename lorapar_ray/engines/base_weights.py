"""The base model's tensors by checkpoint name, from which every merged policy is computed.

On a CPU they are read from memory-mapped files, without a copy. On a GPU they are read once and kept: on the GPU if
they are small compared with its free memory, else in pinned host memory, so that a sync reads no file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from lorapar_ray.models import model_folder
from lorapar_ray.transfer import on_device

RESIDENT_SHARE = 0.1
"""Share of a GPU's free memory, or of an engine's part of it, for a resident copy of the adapted weights; larger copies
are pinned."""


class BaseWeights(Mapping[str, Tensor]):
    """Read from the model's files when asked for."""

    def __init__(self, model: Path) -> None:
        """`model`: a directory, or a hub name whose files have been downloaded already."""
        self.device = torch.device("cpu")
        self._files = {}
        for file in sorted(model_folder(str(model)).glob("*.safetensors")):
            opened = safe_open(file, framework="pt")
            self._files.update(dict.fromkeys(opened.keys(), opened))

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def columns(self, name: str, columns: Tensor) -> Tensor:
        """Some columns of a matrix; one by one, which is faster than threads that wait for each other. `columns` is in
        host memory."""
        matrix = self[name]
        return torch.stack([matrix[:, column] for column in columns.tolist()], dim=1)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


class KeptWeights(Mapping[str, Tensor]):
    """Base weights cached for `device`: each is read once from its file, at first use."""

    def __init__(self, files: Mapping[str, Tensor], device: torch.device, *, resident: bool) -> None:
        """`resident`: keep them on the device; else in pinned host memory, copied from there each time."""
        self._files = files
        self.device = device
        self._resident = resident
        self._kept: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        return self._keep(name).to(self.device, non_blocking=True)

    def _keep(self, name: str) -> Tensor:
        if name not in self._kept:
            read = self._files[name]
            self._kept[name] = read.to(self.device) if self._resident else read.pin_memory()
        return self._kept[name]

    def columns(self, name: str, columns: Tensor) -> Tensor:
        """Some columns of a matrix, on the device; only these are copied there. `columns` is in host memory."""
        kept = self._keep(name)
        return on_device(kept[:, on_device(columns, kept.device)], self.device)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def kept_on(
    files: Mapping[str, Tensor], names: Iterable[str], device: torch.device, part: float, ranks: int
) -> KeptWeights:
    """The base for policies that adapt `names`, on a GPU of which the engine fills `part`: a learner may need what is
    free beside it.

    Raises:
        ValueError: it must be pinned, by each of the engine's `ranks`, and the host has too little memory.
    """
    import psutil

    size = sum(files[name].nbytes for name in names)
    free, total = torch.cuda.mem_get_info(device)
    resident = size <= RESIDENT_SHARE * min(free, part * total)
    if not resident:
        require_host_memory(size, ranks, psutil.virtual_memory().available)
    return KeptWeights(files, device, resident=resident)


def require_host_memory(size: int, ranks: int, available: int) -> None:
    """Check that each rank can pin `size` bytes in the memory of its host; all of an engine's ranks are on one.

    Raises:
        ValueError: they cannot.
    """
    if size * ranks > available:
        raise ValueError(
            f"grpo.sync: merged keeps the adapted weights in host memory, {size / 2**30:.1f} GiB for each of {ranks} "
            f"ranks, and {available / 2**30:.1f} GiB are available; set grpo.sync: adapter"
        )
