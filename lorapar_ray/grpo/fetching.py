"""A learner fetches its share of a step: numbers from the coordinator, records from the object store."""

from __future__ import annotations

from typing import Any

from lorapar_ray.engines.record import GroupRecord, read_record
from lorapar_ray.grpo.asking import answer_from
from lorapar_ray.grpo.batches import Share, mini_batches
from lorapar_ray.grpo.samples import MiniBatch


def fetch(
    coordinator: Any, step: int, rank: int, world: int, *, together: int = 1, packed: bool = True
) -> tuple[Share, list[MiniBatch]]:
    """This rank's share of a step with its samples.

    If any rank finds that records were lost with a node, their groups are sampled again; then the step is dealt again,
    so every rank asks again.

    Args:
        together: so many consecutive ranks have the same share (`grpo.sequence_parallel`).
        packed: the learners compute a prompt once for a group's completions.
    """
    while True:
        asked = coordinator.batch.remote(step, rank // together, world // together, packed)
        share: Share = answer_from(coordinator, asked)
        records = _records(share)
        lost = sorted({part.group for update in share.updates for part in update.parts if part.group not in records})
        if lost:
            answer_from(coordinator, coordinator.lost.remote(step, lost))
        if not _any_rank(bool(lost), world):
            return share, mini_batches(share, records)


def _records(share: Share) -> dict[int, GroupRecord]:
    """By number of the group; lost ones are missing."""
    import ray

    references = {part.group: part.record for update in share.updates for part in update.parts}
    try:
        return dict(zip(references, ray.get(list(references.values())), strict=True))
    except ray.exceptions.ObjectLostError:
        return {group: record for group, each in references.items() if (record := read_record(each)) is not None}


def _any_rank(value: bool, world: int) -> bool:
    if world == 1:
        return value
    from lorapar_ray.collectives import most_of_any_rank
    from lorapar_ray.student import device

    return most_of_any_rank(int(value), device()) > 0
