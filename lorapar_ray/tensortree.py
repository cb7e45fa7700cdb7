"""Nested dicts and lists of tensors and plain values in one safetensors file: training state without pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lorapar_ray.boundary import damaged, open_tensors, read_tensors_and_metadata
from lorapar_ray.errors import UserError
from lorapar_ray.files import atomic_path

_TENSOR = "__tensor__"
OTHERS = "delete it: the run resumes from the previous checkpoint"


def save_tree(path: Path, tree: Any) -> None:
    """Write `tree` atomically. Dicts may have str or int keys; leaves are tensors or JSON values."""
    tensors: dict[str, torch.Tensor] = {}

    def strip(node: Any) -> Any:
        if isinstance(node, torch.Tensor):
            name = f"t{len(tensors)}"
            tensors[name] = node.detach().cpu().contiguous().clone()
            return {_TENSOR: name}
        if isinstance(node, dict):
            return {"__items__": [[key, strip(value)] for key, value in node.items()]}
        if isinstance(node, list | tuple):
            return [strip(value) for value in node]
        return node

    skeleton = json.dumps(strip(tree))
    with atomic_path(path) as draft:
        save_file(tensors, draft, metadata={"tree": skeleton})


def load_tree(path: Path) -> Any:
    """Read what `save_tree` wrote; tuples become lists.

    Raises:
        UserError: the file is missing, damaged, or another one.
    """
    tensors, metadata = read_tensors_and_metadata(path, OTHERS)

    def fill(node: Any) -> Any:
        if isinstance(node, list):
            return [fill(value) for value in node]
        if isinstance(node, dict):
            if _TENSOR in node:
                return tensors[node[_TENSOR]]
            return {key: fill(value) for key, value in node["__items__"]}
        return node

    with damaged(path, OTHERS):
        return fill(json.loads(metadata["tree"]))


def is_whole(path: Path) -> bool:
    """Whether a safetensors file is complete: its header contains the length, so no tensor is read."""
    try:
        open_tensors(path).metadata()
    except UserError:
        return False
    return True
