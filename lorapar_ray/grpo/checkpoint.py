"""Stage 2's checkpoints: adapter, optimiser, random state, and the state of the prompt stream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorapar_ray.tensortree import is_whole, load_tree, save_tree

KEPT = 2


def save(folder: Path, step: int, tree: dict[str, Any]) -> None:
    """Write a checkpoint after `step` steps; delete the oldest ones."""
    save_tree(folder / f"step-{step:07d}.safetensors", {"step": step, **tree})
    for old in sorted(folder.glob("step-*.safetensors"))[:-KEPT]:
        old.unlink()


def newest(folder: Path, rank: int, world: int) -> dict[str, Any] | None:
    """The newest complete checkpoint that rank 0 sees; truncated files are ignored."""
    found = sorted(folder.glob("step-*.safetensors")) if rank == 0 else []
    found = [file for file in found if is_whole(file)]
    if world > 1:  # another node's view of a shared file system may lag behind
        import torch.distributed as dist

        names: list[Any] = [[file.name for file in found]]
        dist.broadcast_object_list(names)
        found = [folder / name for name in names[0]]
    tree: dict[str, Any] | None = load_tree(found[-1]) if found else None
    return tree
