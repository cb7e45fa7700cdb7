"""Checkpoints of the trainer in safetensors: nothing of ours is pickled, and half a checkpoint is never resumed from.

A checkpoint directory holds `parameters.safetensors` (what trains), `optimizer.safetensors` (with the schedule), one
`rng-<rank>.safetensors` per worker and, last, transformers' `trainer_state.json` (step, callbacks' state).
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lorapar_ray.tensortree import load_tree, save_tree

PARAMETERS, OPTIMIZER, STATE = "parameters.safetensors", "optimizer.safetensors", "trainer_state.json"


def last_checkpoint(folder: Path, workers: int) -> tuple[str, int] | None:
    """(path, steps done) of the newest whole checkpoint, written by as many workers; None if there is none."""
    whole = {step: path for path in folder.glob("checkpoint-*") if (step := _steps_of(path, workers)) is not None}
    return (str(whole[max(whole)]), max(whole)) if whole else None


def _steps_of(path: Path, workers: int) -> int | None:
    try:
        state = json.loads((path / STATE).read_text())
    except (OSError, ValueError):  # killed before or while it was written
        return None
    written = all((path / _rng_file(rank)).is_file() for rank in range(workers))
    return int(state["global_step"]) if written else None


class SafetensorsCheckpoints:
    """Replaces how transformers' `Trainer` writes and reads its checkpoints; mix in before the trainer class."""

    args: Any
    model: Any
    optimizer: Any
    lr_scheduler: Any
    state: Any

    def _save(self, output_dir: str, state_dict: Any = None) -> None:
        if self.args.should_save:
            save_tree(Path(output_dir) / PARAMETERS, {key: value.data for key, value in self._trained().items()})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._assign(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        self._assign(Path(self.state.best_model_checkpoint))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.args.should_save:
            tree = {"optimizer": self.optimizer.state_dict(), "schedule": self.lr_scheduler.state_dict()}
            save_tree(Path(output_dir) / OPTIMIZER, tree)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            tree = load_tree(Path(checkpoint) / OPTIMIZER)
            self.optimizer.load_state_dict(tree["optimizer"])
            self.lr_scheduler.load_state_dict(tree["schedule"])

    def _save_rng_state(self, output_dir: str) -> None:
        save_tree(Path(output_dir) / _rng_file(self.args.process_index), rng_state())

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            set_rng_state(load_tree(Path(checkpoint) / _rng_file(self.args.process_index)))

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """None: a checkpoint is not a model to publish."""

    def _trained(self) -> dict[str, Any]:
        return {key: value for key, value in self.model.named_parameters() if value.requires_grad}

    def _assign(self, checkpoint: Path) -> None:
        saved = load_tree(checkpoint / PARAMETERS)
        for key, parameter in self._trained().items():
            parameter.data.copy_(saved[key])


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
