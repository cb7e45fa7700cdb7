"""How a policy gets from the learner that made it to the engines: through Ray's object store, or directly.

Directly is Ray's Direct Transport with NIXL: the bytes stay in the learner's memory, and each engine reads them from
there, over RDMA where the network has it and else over TCP. No group of processes has to be formed, so engines and
learners may die and start at any time. Ray's other transports need one, and kill the learner if an engine dies in the
middle of a transfer.

In both cases the receiver checks the digest of what it rebuilt (see `PolicyReceiver`).
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from lorapar_ray.engines.policy import Policy
from lorapar_ray.errors import UserError

Transport = Literal["object_store", "direct"]


@dataclass(frozen=True)
class DirectPolicy:
    """A policy in its sender's memory."""

    reference: Any
    """To its `Parts`; nested, so that an engine fetches them itself: as an argument of a call Ray would push them."""


@dataclass(frozen=True)
class Parts:
    """A policy whose bytes Ray moves as a tensor."""

    policy: Policy
    """Without its tensors."""
    tensors: Tensor
    """uint8, [size of the policy]"""


def sent(policy: Policy, transport: Transport) -> Any:
    """What an engine's `load_policy` takes: a reference to the policy, or a `DirectPolicy`."""
    import ray

    if transport == "object_store":
        return ray.put(policy)
    tensors = torch.frombuffer(bytearray(policy.tensors), dtype=torch.uint8)
    return DirectPolicy(ray.put(Parts(replace(policy, tensors=b""), tensors), _tensor_transport="nixl"))


async def received(policy: Policy | DirectPolicy) -> Policy:
    """The policy, read from its sender's memory if it is there.

    Raises:
        ray.exceptions.ObjectLostError: its sender has died, or has not answered for a minute.
        ray.exceptions.RayDirectTransportError: the transfer failed, perhaps because its sender has died.
    """
    if isinstance(policy, Policy):
        return policy
    import ray

    # Ray warns of a `get` in an actor like this one; awaiting the reference instead would not start the transfer
    os.environ.setdefault("RAY_WARN_BLOCKING_GET_INSIDE_ASYNC", "0")
    parts: Parts = await asyncio.to_thread(ray.get, policy.reference)
    return replace(parts.policy, tensors=parts.tensors.numpy().tobytes())


def require_nixl() -> None:
    """Check that this machine has what the direct transport needs.

    Raises:
        UserError: NIXL is not installed, or does not load.
    """
    try:
        import nixl._api  # noqa: F401
    except (ImportError, OSError) as error:
        raise UserError(
            f"grpo.policy_transport: direct needs NIXL ({error}): pip install 'lorapar-ray[direct]' on every node, "
            "or set object_store"
        ) from error
