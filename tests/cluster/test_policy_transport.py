"""Policies that engines read from the learner's memory, with real NIXL between real processes, some of which die."""

import os
import signal
import sys
from typing import Any

import pytest
import ray
import torch
from ray.experimental import get_object_locations

from lorapar_ray.engines.losses import fetch_failed, is_dead
from lorapar_ray.engines.policy import PolicyNote, PolicyReceiver, PolicySender, note_of
from lorapar_ray.engines.policy_transport import received, require_nixl, sent
from lorapar_ray.errors import UserError

pytestmark = pytest.mark.cluster
SIZE = 1 << 20
"""Numbers of the adapter; half of them may change."""


class Learner:
    """Sends an adapter that moves, as rank 0 does: nothing but the note refers to the policy."""

    def __init__(self) -> None:
        mask = torch.arange(SIZE) % 2 == 0
        self.sender, self.adapter = PolicySender("{}", {"m": mask}), torch.zeros(SIZE)
        self.mask = mask

    def pid(self) -> int:
        return os.getpid()

    def publish(self, version: int) -> PolicyNote:
        self.adapter[self.mask] += torch.randn(int(self.mask.sum()), generator=torch.Generator().manual_seed(version))
        policy = self.sender.policy(version, {"m": self.adapter})
        return note_of(policy, sent(policy, "direct"))

    def held(self) -> int:
        """Number of policies in this process's memory."""
        stored: int = ray._private.worker.global_worker.rdt_manager.rdt_store.get_num_objects()
        return stored


class Engine:
    """Rebuilds the adapter, as an engine's actor does before it loads it."""

    def __init__(self) -> None:
        self.receiver = PolicyReceiver()

    def pid(self) -> int:
        return os.getpid()

    async def load(self, *policies: Any) -> int:
        """Raises unless the digest of every policy is right; returns the last one's version."""
        for each in policies:
            policy = await received(each)
            self.receiver.adapter(policy)
        return policy.version


class Coordinator:
    """Passes notes on; it holds the current policy and the last whole one."""

    def __init__(self) -> None:
        self.notes: dict[str, PolicyNote] = {}

    def take(self, note: PolicyNote) -> int:
        """Returns the bytes of what is in the object store."""
        self.notes[note.kind] = note
        return int(get_object_locations([note.reference.reference])[note.reference.reference]["object_size"] or 0)

    async def load(self, engine: Any, *kinds: str) -> int:
        loaded: int = await engine.load.remote(*(self.notes[kind].reference for kind in kinds))
        return loaded


def actor(kind: type) -> Any:
    return ray.remote(kind).options(num_cpus=0, max_concurrency=10).remote()


def kill(victim: Any) -> None:
    os.kill(ray.get(victim.pid.remote()), signal.SIGKILL)


def test_engines_and_learners_may_die_and_start_and_the_digest_is_checked(cluster: None) -> None:
    coordinator, learner, engine, other = (actor(kind) for kind in (Coordinator, Learner, Engine, Engine))
    for version in range(4):
        stored = ray.get(coordinator.take.remote(learner.publish.remote(version)))
        assert 0 < stored < 4096 < SIZE
        kind = "changes" if version else "whole"
        assert ray.get([coordinator.load.remote(each, kind) for each in (engine, other)]) == [version] * 2
    assert ray.get(learner.held.remote()) == 2  # what nobody needs any more is freed

    kill(engine)
    with pytest.raises(ray.exceptions.RayError) as lost:
        ray.get(coordinator.load.remote(engine, "changes"))
    assert is_dead(lost.value)
    successor = actor(Engine)
    assert ray.get(coordinator.load.remote(successor, "whole", "changes")) == 3
    ray.get(coordinator.take.remote(learner.publish.remote(4)))
    assert ray.get([coordinator.load.remote(each, "changes") for each in (successor, other)]) == [4, 4]

    ray.get(coordinator.take.remote(learner.publish.remote(5)))
    kill(learner)
    with pytest.raises(ray.exceptions.RayError) as lost:
        ray.get(coordinator.load.remote(other, "changes"))
    assert fetch_failed(lost.value)
    restarted = actor(Learner)
    ray.get(coordinator.take.remote(restarted.publish.remote(6)))
    assert ray.get([coordinator.load.remote(each, "whole") for each in (successor, other)]) == [6, 6]


def test_a_machine_without_nixl_is_told_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    require_nixl()
    monkeypatch.setitem(sys.modules, "nixl", None)  # as if it were not installed
    with pytest.raises(UserError, match=r"grpo.policy_transport: direct needs NIXL .*lorapar-ray\[direct\]"):
        require_nixl()
