"""Placement of stage 2's processes: engines in their own placement group, learners in Ray Train's.

The group holds each engine's bundle while the stage runs, so a replaced engine finds its GPUs free even on a busy
cluster, and after the loss of a node Ray moves the bundle to another. Learners also reserve theirs as a group.

Separate GPUs: whole numbers on both sides. Colocated, one engine and one learner on each GPU: give engines more than
half of a GPU and learners the rest. Then two engines never fit on one GPU, and each learner takes the rest of an
engine's GPU. On GPUs without an engine the engine's share stays reserved; else two learners would fit there, which NCCL
refuses.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lorapar_ray.config import Config, Resources
from lorapar_ray.errors import UserError
from lorapar_ray.grpo.stage import STAGE
from lorapar_ray.progress import console
from lorapar_ray.workers import bundle

LOOK_S = 5
"""Seconds until a wait is reported."""


@contextmanager
def reserved(config: Config) -> Iterator[Any]:
    """A placement group with one bundle for each rollout engine, all ranks of a tensor-parallel one on one node; None
    if engines ask Ray for nothing.

    Raises:
        UserError: the resources were not free in time, on a cluster that does not grow.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    settings = config.grpo
    engines, resources = settings.rollout_actors, settings.rollout_resources
    if not any(bundle(resources).values()):
        yield None  # nothing to reserve
        return
    empty = empty_places(config, ray.available_resources().get("GPU", 0.0))
    group = placement_group(
        [bundle(resources)] * engines + [{"GPU": resources.gpu_count}] * empty,
        strategy=settings.rollout_placement.upper(),
        bundle_label_selector=[dict(resources.nodes)] * (engines + empty) if resources.nodes else None,
    )
    try:
        wait_for_places(group, config)
        yield group
    finally:
        remove_placement_group(group)


def wait_for_places(group: Any, config: Config) -> None:
    """Until the engines' bundles have their places; on a cluster that does not grow for at most `cluster.wait_s`."""
    limit_s = math.inf if config.cluster.grows else config.cluster.wait_s
    deadline, said = time.monotonic() + limit_s, False
    asked = f"room for {config.grpo.rollout_actors} rollout engines of {bundle(config.grpo.rollout_resources)}, each"
    while not group.wait(min(limit_s, LOOK_S)):
        if time.monotonic() > deadline:
            raise UserError(
                f"grpo: no {asked} on a single node, within {limit_s:g} s; lower grpo.rollout_actors or "
                "grpo.rollout_resources, or see `ray status`"
            )
        if not said:
            limit = "" if config.cluster.grows else f"up to {limit_s:g} s "
            console.print(f"  grpo waits {limit}for {asked} on a single node")
        said = True


def empty_places(config: Config, free: float) -> int:
    """Engine-sized bundles to reserve on those GPUs without an engine, if engines and learners share GPUs.

    Args:
        free: GPUs that nobody has taken, in all. The judges, who run by now, have taken a part of some; they leave room
            for an engine and a learner there.
    """
    settings = config.grpo
    shared = 0 < settings.rollout_resources.gpu_count < 1 and 0 < settings.learner_resources.gpu_count < 1
    judges = [each for each in config.judges if each.has_engine and each.resources.gpu_count < 1]
    gpus = math.floor(free + sum(each.replicas * each.resources.gpu_count for each in judges) + 1e-6)
    return max(0, gpus - settings.rollout_actors) if shared and settings.learners > 1 else 0


def without_a_bundle(config: Config) -> tuple[tuple[int, Resources], ...]:
    """Reward workers, environment workers and judges, which ask Ray alone when they start (again): the number of each
    kind, and the resources of one."""
    groups = STAGE.groups(config)
    return tuple(group for name, group in groups.items() if name not in ("rollout_actors", "learners"))
