"""A zero adapter: the base is served with it, next to other adapters.

vLLM's LoRA for CPUs takes the adapter of a sequence by its place in a stack, and the place of a sequence without one,
-1, is the last: in a batch with others it would answer with the last adapter (seen in vLLM 0.29).
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from lorapar_ray.adapters.store import read_adapter_state, write_adapter_state


def write_neutral(folder: Path, like: Path) -> None:
    """Write an adapter of the same shape whose numbers are all zero."""
    state = {key: torch.zeros_like(value) for key, value in read_adapter_state(like).items()}
    write_adapter_state(folder, json.loads((like / "adapter_config.json").read_text()), state)
