"""Checkpoints of stage 1 in safetensors: nothing is pickled, and an incomplete checkpoint is never used.

A checkpoint directory holds `parameters.safetensors` (what trains), `optimizer.safetensors`, one
`rng-<rank>.safetensors` per worker and, last, `trainer_state.json` (the step, the best validation so far). Another
number of workers can resume from it too: a step's examples do not depend on the number, and a worker without such a
file draws dropout from a seed.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorapar_ray.boundary import damaged, read_object
from lorapar_ray.collectives import of_rank_0
from lorapar_ray.errors import UserError
from lorapar_ray.files import write_json
from lorapar_ray.storage.sight import wait_until_seen
from lorapar_ray.tensortree import OTHERS, is_whole, load_tree, save_tree

PARAMETERS, OPTIMIZER, STATE = "parameters.safetensors", "optimizer.safetensors", "trainer_state.json"
WORKERS = "workers"
MOST_WORKERS = 100_000
"""A checkpoint that claims more is damaged."""


def last_checkpoint(folder: Path, workers: int) -> tuple[str, int] | None:
    """(path, steps done) of the newest whole checkpoint, by any number of workers; None if there is none.

    Args:
        workers: how many wrote it, where the checkpoint does not say so.
    """
    whole = {step: path for path in folder.glob("checkpoint-*") if (step := _steps_of(path, workers)) is not None}
    return (str(whole[max(whole)]), max(whole)) if whole else None


def common_checkpoint(folder: Path, rank: int, world: int) -> tuple[str, int] | None:
    """The checkpoint that rank 0 resumes from, for every rank; as `last_checkpoint` returns it.

    Ranks that resume from different steps would add up gradients of different parameters. Every rank calls this.

    Raises:
        UserError: this rank does not get to see rank 0's checkpoint.
    """
    found = last_checkpoint(folder, world) if rank == 0 else None
    chosen = of_rank_0(None if found is None else (Path(found[0]).name, found[1]), world)
    if chosen is None:
        return None
    path, step = folder / chosen[0], chosen[1]  # in an object store each rank has a folder of its own
    if rank != 0:
        wait_until_seen(path, lambda: _steps_of(path, world) == step)
    return str(path), step


def _steps_of(path: Path, workers: int) -> int | None:
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        step = int(state["global_step"])
    except (OSError, ValueError, OverflowError, RecursionError, KeyError, TypeError):  # half written
        return None
    try:
        found = load_tree(path / _rng_file(0))
    except UserError:  # damaged: resume from the previous checkpoint
        return None
    ranks = found.get(WORKERS, workers) if isinstance(found, dict) else None
    if not isinstance(ranks, int) or not 0 < ranks <= MOST_WORKERS:
        return None
    files = [PARAMETERS, OPTIMIZER, *map(_rng_file, range(ranks))]
    return step if all(is_whole(path / file) for file in files) else None


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0
    best_loss: float | None = None
    """Lowest validation loss so far."""
    best_checkpoint: str | None = None
    """The checkpoint directory of `best_loss`."""
    waited: int = 0
    """Validations in a row without a lower loss."""

    def heard(self, loss: float) -> bool:
        """Record a validation's loss; returns whether it is the lowest so far."""
        improved = not isnan(loss) and (self.best_loss is None or loss < self.best_loss)
        self.waited = 0 if improved else self.waited + 1
        if improved:
            self.best_loss = loss
        return improved


def save_checkpoint(
    folder: Path, rank: int, world: int, progress: Progress, parameters: Mapping[str, Tensor], optimizer: Any
) -> None:
    """Write `checkpoint-<step>` of `folder`, and delete old ones except the last two and the best.

    Every rank calls this at the same step; rank 0 writes the parts that are equal on all.
    """
    path = folder / f"checkpoint-{progress.step}"
    path.mkdir(parents=True, exist_ok=True)
    save_tree(path / _rng_file(rank), {**rng_state(), WORKERS: world})
    if rank == 0:
        save_tree(path / PARAMETERS, {key: value.data for key, value in parameters.items()})
        save_tree(path / OPTIMIZER, {"optimizer": optimizer.state_dict()})
    if world > 1:
        torch.distributed.barrier()  # the last file: once it exists, the checkpoint is complete
    if rank == 0:
        write_json(path / STATE, _as_transformers_writes(progress))
        for old in sorted(folder.glob("checkpoint-*"), key=lambda each: int(each.name.split("-")[1]))[:-2]:
            if str(old) != progress.best_checkpoint:
                shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(path: Path, rank: int, parameters: Mapping[str, Tensor], optimizer: Any) -> Progress:
    """Restore parameters, optimiser and random generators; the schedule is a function of the step.

    Raises:
        UserError: a file is damaged, or of another adapter.
    """
    load_parameters(path, parameters)
    state = read_object(path / STATE, OTHERS)
    with damaged(path, OTHERS):
        optimizer.load_state_dict(load_tree(path / OPTIMIZER)["optimizer"])
        if (path / _rng_file(rank)).is_file():  # else one more worker than before, with a seed of its own
            set_rng_state(load_tree(path / _rng_file(rank)))
        best = state.get("best_model_checkpoint")
        stopping = state.get("stateful_callbacks", {}).get("EarlyStoppingCallback", {}).get("attributes", {})
        return Progress(
            step=int(state["global_step"]),
            best_loss=state.get("best_metric"),
            best_checkpoint=best and str(path.with_name(Path(best).name)),  # the run may have been moved
            waited=int(stopping.get("early_stopping_patience_counter", 0)),
        )


def load_parameters(path: Path, parameters: Mapping[str, Tensor]) -> None:
    """Restore the trained parameters from a checkpoint.

    Raises:
        UserError: the file is damaged, or of another adapter.
    """
    saved = load_tree(path / PARAMETERS)
    with damaged(path / PARAMETERS, OTHERS):
        for key, parameter in parameters.items():
            parameter.data.copy_(saved[key])


def _as_transformers_writes(progress: Progress) -> dict[str, Any]:
    """The names of transformers' `trainer_state.json`, so that older checkpoints are resumed from too."""
    return {
        "global_step": progress.step,
        "best_metric": progress.best_loss,
        "best_model_checkpoint": progress.best_checkpoint,
        "stateful_callbacks": {
            "EarlyStoppingCallback": {"attributes": {"early_stopping_patience_counter": progress.waited}}
        },
    }


def rng_state() -> dict[str, Any]:
    """State of every generator that training draws from: Python's, NumPy's, torch's, and CUDA's of this process."""
    name, keys, *rest = np.random.get_state(legacy=True)
    state = {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
    }
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def set_rng_state(state: dict[str, Any]) -> None:
    """Undo what was drawn since `rng_state`."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _rng_file(rank: int) -> str:
    return f"rng-{rank}.safetensors"
