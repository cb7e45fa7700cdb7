"""Stage 2's checkpoints: adapter, optimiser, random state, and the state of the prompt stream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorapar_ray.collectives import of_rank_0
from lorapar_ray.storage.sight import wait_until_seen
from lorapar_ray.tensortree import is_whole, load_tree, save_tree

KEPT = 2


def save(folder: Path, step: int, tree: dict[str, Any]) -> None:
    """Write a checkpoint after `step` steps; delete the oldest ones."""
    save_tree(folder / f"step-{step:07d}.safetensors", {"step": step, **tree})
    for old in sorted(folder.glob("step-*.safetensors"))[:-KEPT]:
        old.unlink()


def newest(folder: Path, rank: int, world: int) -> dict[str, Any] | None:
    """The newest complete checkpoint that rank 0 sees; truncated files are ignored. Every rank calls this.

    Raises:
        UserError: it is damaged although its length is right, or this rank does not get to see it.
    """
    found = sorted(folder.glob("step-*.safetensors"), reverse=True) if rank == 0 else []
    name = of_rank_0(next((file.name for file in found if is_whole(file)), None), world)
    if name is None:
        return None
    file = folder / name
    if rank != 0:
        wait_until_seen(file, lambda: is_whole(file))
    tree: dict[str, Any] = load_tree(file)
    return tree
