"""Policy messages: the receiver gets exactly the sent bits, or refuses the message."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load

from lorapar_ray.engines.policy import PolicyError, PolicyReceiver, PolicySender, adapter_bytes, pack_bits, unpack_bits

SHAPES = {"m.lora_A.weight": (4, 33), "m.lora_B.weight": (17, 4)}


def draw(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator) for key, shape in SHAPES.items()}


def masks_of(seed: int, share: float) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.rand(shape, generator=generator) < share for key, shape in SHAPES.items()}


@given(st.lists(st.booleans(), max_size=70))
def test_masks_survive_packing(bits: list[bool]) -> None:
    mask = torch.tensor(bits, dtype=torch.bool)
    assert torch.equal(unpack_bits(pack_bits(mask), len(bits)), mask)
    assert pack_bits(mask).numel() == -(-len(bits) // 8)


@given(st.integers(0, 99), st.sampled_from([0.0, 0.1, 0.6, 1.0]))
def test_changes_give_the_same_adapter_as_the_whole(seed: int, share: float) -> None:
    masks, state = masks_of(seed, share), draw(seed)
    sender, receiver = PolicySender("{}", masks), PolicyReceiver()
    first = sender.policy(0, state)
    assert receiver.adapter(first) == adapter_bytes(state)
    for version in (1, 2):
        moved = draw(seed + version)
        state = {key: torch.where(masks[key], moved[key], value) for key, value in state.items()}
        policy = sender.policy(version, state)
        assert policy.kind == "changes"
        assert receiver.adapter(policy) == adapter_bytes(state)
        active = sum(int(mask.sum()) for mask in masks.values())
        assert sum(value.numel() for value in load(policy.tensors).values()) == active
    late = PolicyReceiver()  # the first policy and the latest one are enough
    late.adapter(first)
    assert late.adapter(policy) == adapter_bytes(state)


def test_without_a_partition_every_policy_is_whole() -> None:
    sender, receiver = PolicySender("{}"), PolicyReceiver()
    for version in range(2):
        policy = sender.policy(version, draw(version))
        assert policy.kind == "whole"
        assert receiver.adapter(policy) == adapter_bytes(draw(version))


def test_inconsistent_policies_are_refused() -> None:
    masks, state = masks_of(0, 0.5), draw(0)
    sender = PolicySender("{}", masks)
    whole = sender.policy(0, state)
    changes = sender.policy(1, {key: value + masks[key] for key, value in state.items()})
    with pytest.raises(PolicyError, match="never received"):
        PolicyReceiver().adapter(changes)
    receiver = PolicyReceiver()
    receiver.adapter(whole)
    with pytest.raises(PolicyError, match="policy 1 arrived as"):
        receiver.adapter(replace(changes, digest=whole.digest))
    frozen_moved = {key: value + 1.0 for key, value in state.items()}
    with pytest.raises(PolicyError, match="policy 2 arrived as"):
        receiver.adapter(sender.policy(2, frozen_moved))
