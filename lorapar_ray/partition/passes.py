"""The passes over the scores that find a cut. Each returns counts that merge, so threads count parts of the scores."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lorapar_ray.errors import UserError
from lorapar_ray.partition.blocks import Block, blocks, checked_bits, ordered_map
from lorapar_ray.partition.histogram import FINE_BINS, Crossing, ScoreHistogram, Threshold, low_halves

GroupOf = Callable[[str], str]
Goal = Callable[[ScoreHistogram], Crossing]
Histograms = dict[str, ScoreHistogram]
"""By group of keys."""
Bins = dict[str, set[int]]
"""By group, the coarse bins that contain a cut."""
FineCounts = dict[tuple[str, int], NDArray[np.int64]]
"""By group and coarse bin, how often each low half occurs in it (65536 bins)."""

BATCH_ELEMENTS = 1 << 20
"""Elements whose fine counts are made at a time."""
WHOLE_ADAPTER = "adapter"
"""The group of all keys, if keys are not grouped."""


def whole_adapter(key: str) -> str:
    """The paper's grouping: one ranking over every key."""
    return WHOLE_ADAPTER


def cut(
    goals: Sequence[Goal], histograms: Histograms, count: Callable[[Bins], FineCounts]
) -> list[dict[str, Threshold]]:
    """For each goal, each group's exact cut, from the first pass' histograms and one further pass, `count`.

    Raises:
        UserError: there are no scores, or a goal cannot be met.
    """
    if not histograms:
        raise UserError("there are no importance scores to select from; score the adapter first")
    crossings = [{group: _crossing(histograms, group, goal) for group in histograms} for goal in goals]
    fine = count({group: {crossing[group].bin for crossing in crossings} for group in histograms})
    return [
        {group: crossing.refine(fine[group, crossing.bin]) for group, crossing in by_group.items()}
        for by_group in crossings
    ]


def count_scores(scores: Mapping[str, Tensor], group_of: GroupOf, workers: int | None) -> Histograms:
    """The first pass: each group's histogram.

    Raises:
        UserError: a score that is NaN, infinite or negative.
    """

    def count(block: Block) -> Histograms:
        histogram = ScoreHistogram()
        histogram.add(checked_bits(block))
        return {group_of(block.key): histogram}

    return merge_histograms(ordered_map(count, blocks(scores), workers))


def count_inside(scores: Mapping[str, Tensor], wanted: Bins, group_of: GroupOf, workers: int | None) -> FineCounts:
    """The second pass: the low halves of the scores in the `wanted` bins."""

    def inside(batch: list[Block]) -> FineCounts:
        found = defaultdict[tuple[str, int], list[NDArray[np.uint16]]](list)
        for block in batch:
            group = group_of(block.key)
            for bin, low in low_halves(checked_bits(block), wanted[group]).items():
                found[group, bin].append(low)
        return {place: np.bincount(np.concatenate(low), minlength=FINE_BINS) for place, low in found.items()}

    nothing = {(group, bin): np.zeros(FINE_BINS, np.int64) for group, bins in wanted.items() for bin in bins}
    return merge_fine_counts([nothing], ordered_map(inside, batches(blocks(scores)), workers))


def batches(stream: Iterable[Block]) -> Iterator[list[Block]]:
    """Blocks of at least `BATCH_ELEMENTS` elements together: most tensors have fewer than there are fine bins."""
    batch: list[Block] = []
    for block in stream:
        batch.append(block)
        if sum(each.bits.size for each in batch) >= BATCH_ELEMENTS:
            yield batch
            batch = []
    if batch:
        yield batch


def merge_histograms(parts: Iterable[Histograms]) -> Histograms:
    """The histograms of all parts together."""
    merged: Histograms = {}
    for part in parts:
        for group, histogram in part.items():
            merged.setdefault(group, ScoreHistogram()).merge(histogram)
    return merged


def merge_fine_counts(*streams: Iterable[FineCounts]) -> FineCounts:
    """The fine counts of all parts together."""
    merged: FineCounts = {}
    for stream in streams:
        for part in stream:
            for place, counts in part.items():
                merged[place] = merged[place] + counts if place in merged else counts
    return merged


def _crossing(histograms: Histograms, group: str, goal: Goal) -> Crossing:
    try:
        return goal(histograms[group])
    except UserError as error:
        if len(histograms) == 1:
            raise
        raise UserError(f"group '{group}': {error}") from error
