"""Scores and masks larger than memory: memory-mapped safetensors in, one safetensors file written as a stream."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lorapar_ray.boundary import open_tensors
from lorapar_ray.errors import UserError
from lorapar_ray.files import atomic_path


class ShardedScores(Mapping[str, Tensor]):
    """The tensors of several safetensors files as one read-only mapping; a tensor is a view of the mapped file.

    Raises:
        UserError: a file is missing or unreadable, or two files hold the same key.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._files: dict[str, Any] = {}
        for path in paths:
            file = open_safetensors(path)
            for key in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                if key in self._files:
                    raise UserError(f"scores '{path}': another shard already holds '{key}'; pass each shard once")
                self._files[key] = file

    def __getitem__(self, key: str) -> Tensor:
        tensor: Tensor = self._files[key].get_tensor(key)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._files))

    def __len__(self) -> int:
        return len(self._files)


def open_safetensors(path: Path) -> Any:
    """An open `safe_open` handle whose tensors are views of the mapped file.

    Raises:
        UserError: no such file, or not safetensors.
    """
    return open_tensors(path)


def write_masks(path: Path, shapes: Mapping[str, tuple[int, ...]], pieces: Iterable[NDArray[np.bool_]]) -> None:
    """Write bool tensors in sorted key order from consecutive `pieces` of their flattened concatenation.

    The safetensors package writes only whole tensors, so the header (length, JSON, data) is laid out here. The file
    appears by an atomic rename.
    """
    header: dict[str, Any] = {}
    end = 0
    for key in sorted(shapes):
        begin, end = end, end + math.prod(shapes[key])
        header[key] = {"dtype": "BOOL", "shape": list(shapes[key]), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data to begin on a multiple of 8
    with atomic_path(path) as draft, draft.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for piece in pieces:
            file.write(piece.data)
