"""A policy as a message from the learner to the engines: the whole adapter, or only elements that a step may change.

With a partition a step changes only the stage's own elements. So after the first, whole policy only those values are
sent, concatenated, and the receiver writes them into its adapter. In both cases the digest is that of the whole adapter
file, so a receiver that missed or mixed up versions gets another digest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load, save
from torch import Tensor

MASK = "mask."
"""Prefix of the bit-packed masks that a whole policy contains in addition to the adapter."""


@dataclass(frozen=True)
class Policy:
    """One version of the adapter, as bytes, so that it is one Ray object."""

    version: int
    kind: Literal["whole", "changes"]
    tensors: bytes
    """safetensors. `whole`: the adapter's float32 tensors and, if only some elements ever change, their packed masks;
    `changes`: per key the active elements' values, flat."""
    config: str
    """`adapter_config.json`"""
    digest: str
    """SHA-256 of the adapter file (see `adapter_bytes`) that the receiver must obtain."""


@dataclass(frozen=True)
class PolicyNote:
    """A policy's version, digest and reference; see `policy_transport` for where the policy itself is."""

    version: int
    kind: Literal["whole", "changes"]
    digest: str
    size: int
    """Bytes that are sent to each node, or to each engine."""
    reference: Any
    """To the `Policy`, nested in this note, so that a call with the note does not fetch it; or a `DirectPolicy`."""


def note_of(policy: Policy, reference: Any) -> PolicyNote:
    """The note of a policy that can be fetched with `reference`."""
    return PolicyNote(policy.version, policy.kind, policy.digest, len(policy.tensors), reference)


class PolicyError(RuntimeError):
    """The receiver cannot rebuild the sent adapter: it missed the whole policy, or its bytes differ."""


class PolicySender:
    """Turns the learner's parameters into policies."""

    def __init__(self, config: str, masks: Mapping[str, Tensor] | None = None) -> None:
        """`masks`: bool, by adapter key, of the elements that may ever change; None: all of them."""
        self._config = config
        self._masks = None if masks is None else {key: mask.reshape(-1).cpu() for key, mask in masks.items()}
        self._sent_whole = False

    def policy(self, version: int, parameters: Mapping[str, Tensor]) -> Policy:
        """The parameters (float32, by adapter key) as version `version`; the first one is whole."""
        state = {key: value.detach().float().cpu().contiguous() for key, value in parameters.items()}
        digest = hashlib.sha256(adapter_bytes(state)).hexdigest()
        if self._masks is None or not self._sent_whole:
            kind: Literal["whole", "changes"] = "whole"
            packed = {f"{MASK}{key}": pack_bits(mask) for key, mask in (self._masks or {}).items()}
            tensors = save({**state, **packed})
            self._sent_whole = True
        else:
            kind = "changes"
            tensors = save({key: value.reshape(-1)[self._masks[key]] for key, value in state.items()})
        return Policy(version, kind, tensors, self._config, digest)


class PolicyReceiver:
    """Turns policies back into adapters; keeps the last adapter, to apply changes to it."""

    def __init__(self) -> None:
        self._state: dict[str, Tensor] = {}
        self._masks: dict[str, Tensor] = {}

    def adapter(self, policy: Policy) -> bytes:
        """The adapter file of `policy`.

        Raises:
            PolicyError: changes came before any whole policy, or the result does not have the policy's digest.
        """
        tensors = load(policy.tensors)
        if policy.kind == "whole":
            self._state = {key: value for key, value in tensors.items() if not key.startswith(MASK)}
            self._masks = {
                key: unpack_bits(tensors[f"{MASK}{key}"], value.numel())
                for key, value in self._state.items()
                if f"{MASK}{key}" in tensors
            }
        else:
            if self._state.keys() != tensors.keys():
                raise PolicyError(f"policy {policy.version} holds changes to an adapter that was never received")
            for key, values in tensors.items():
                self._state[key].view(-1)[self._masks[key]] = values
        blob = adapter_bytes(self._state)
        found = hashlib.sha256(blob).hexdigest()
        if found != policy.digest:
            raise PolicyError(f"policy {policy.version} arrived as {found[:9]}, was sent as {policy.digest[:9]}")
        return blob


def adapter_bytes(state: Mapping[str, Tensor]) -> bytes:
    """`adapter_model.safetensors` of an adapter: the same tensors are always the same bytes."""
    blob: bytes = save({key: state[key] for key in sorted(state)}, metadata={"format": "pt"})
    return blob


def read_policy(adapter: Path, version: int) -> Policy:
    """An adapter directory as a whole policy."""
    state = load((adapter / "adapter_model.safetensors").read_bytes())
    return PolicySender((adapter / "adapter_config.json").read_text(encoding="utf-8")).policy(version, state)


def pack_bits(mask: Tensor) -> Tensor:
    """A flat bool mask as uint8, eight elements a byte."""
    bits = torch.nn.functional.pad(mask.to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """The first `count` elements of what `pack_bits` packed."""
    return ((packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1).bool().view(-1)[:count]
