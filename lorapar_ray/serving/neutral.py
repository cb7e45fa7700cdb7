"""A zero adapter, with which the base is served next to other adapters.

vLLM's LoRA for CPUs indexes a stack of adapters. A sequence without an adapter has the index -1, which is the last one:
in a batch with others it would answer with the last adapter (seen in vLLM 0.29).
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from lorapar_ray.adapters.store import read_adapter_state, write_adapter_state


def write_neutral(folder: Path, like: Path) -> None:
    """Write an adapter of the same shape, all zeros."""
    state = {key: torch.zeros_like(value) for key, value in read_adapter_state(like).items()}
    write_adapter_state(folder, json.loads((like / "adapter_config.json").read_text(encoding="utf-8")), state)
