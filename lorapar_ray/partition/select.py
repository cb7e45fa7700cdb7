"""θ selection: the smallest set of the most important elements with a share θ of all importance (paper, section 3.3).

Importance is ranked in descending order over the whole adapter, or per group of keys, and ties are broken by position,
the earlier first (see `blocks`). The answer is exact and the same for any sharding, block size or number of threads.
`scores` may be a dict in memory or `ShardedScores` over files larger than memory: three passes read it block by block.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorapar_ray.partition.blocks import INFINITY_BITS, Block, blocks, checked_bits, ordered_map
from lorapar_ray.partition.histogram import ScoreHistogram, Threshold, check_theta
from lorapar_ray.partition.passes import (
    WHOLE_ADAPTER,
    Goal,
    GroupOf,
    count_inside,
    count_scores,
    cut,
    whole_adapter,
)
from lorapar_ray.partition.shards import ShardedScores, write_masks


def keep_top(
    scores: Mapping[str, Tensor], theta: float, group_of: GroupOf | None = None, workers: int | None = None
) -> dict[str, Tensor]:
    """Bool masks, same keys and shapes as `scores` (float32), of the kept set K at threshold θ.

    With `group_of`, each group of keys is ranked and cut separately. θ = 1 keeps everything.

    Raises:
        UserError: θ outside (0, 1]; a score that is NaN, infinite or negative; a group whose scores are all zero.
    """
    [cuts] = find_thresholds(scores, [theta], group_of, workers)
    return _masks(scores, cuts, group_of or whole_adapter, workers)


def keep_count(scores: Mapping[str, Tensor], count: int, workers: int | None = None) -> dict[str, Tensor]:
    """Bool masks of the `count` most important elements of the whole adapter; ties by position.

    Raises:
        ValueError: `count` is negative or more than there are elements.
    """
    if count == 0:
        nothing = Threshold(INFINITY_BITS, 0, 0, sum(s.numel() for s in scores.values()))
        return _masks(scores, {WHOLE_ADAPTER: nothing}, whole_adapter, workers)
    [cuts] = _cuts(scores, [partial(ScoreHistogram.crossing_count, count=count)], whole_adapter, workers)
    return _masks(scores, cuts, whole_adapter, workers)


def random_mask(like: Mapping[str, Tensor], count: int, seed: int) -> dict[str, Tensor]:
    """Bool masks of exactly `count` elements drawn at random: the paper's baseline ("Rand.") of equal size.

    The draw depends on `seed`, the keys and the shapes, not on the order of the mapping.

    Raises:
        ValueError: `count` is negative or more than there are elements.
    """
    return keep_count(random_scores(like, seed), count)


def random_disjoint(like: Mapping[str, Tensor], counts: Sequence[int], seed: int) -> list[dict[str, Tensor]]:
    """Random sets (bool masks) of these sizes without a common element: consecutive parts of one random order."""
    order = random_scores(like, seed)
    tops = [keep_count(order, sum(counts[:number])) for number in range(len(counts) + 1)]
    return [{key: after[key] & ~before[key] for key in sorted(after)} for before, after in pairwise(tops)]


def random_kept(k1: Mapping[str, Tensor], k2: Mapping[str, Tensor], seed: int) -> list[dict[str, Tensor]]:
    """Two random sets (bool masks) of the sizes of `k1` and `k2` with an intersection of the same size.

    Sets drawn independently would overlap less than chosen ones: with α or β below 1 a stage would train more elements
    than with the sets that they are a control of.
    """
    sizes = [
        sum(int(region(k1[key], k2[key]).sum()) for key in k1)
        for region in (lambda a, b: a & ~b, lambda a, b: a & b, lambda a, b: b & ~a)
    ]
    only1, both, only2 = random_disjoint(k1, sizes, seed)
    return [{key: own[key] | both[key] for key in both} for own in (only1, only2)]


def random_scores(like: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Random scores whose ranking is a uniformly random order: 31 random bits per element, read as float32."""
    scores = {}
    for key in sorted(like):
        name = hashlib.sha256(f"{seed}:{key}".encode()).digest()
        generator = np.random.Generator(np.random.Philox(int.from_bytes(name[:16], "little")))
        bits = generator.integers(0, INFINITY_BITS, like[key].numel(), dtype=np.uint32)
        scores[key] = torch.from_numpy(bits.view(np.float32)).reshape(like[key].shape)
    return scores


def find_thresholds(
    scores: Mapping[str, Tensor],
    thetas: Sequence[float],
    group_of: GroupOf | None = None,
    workers: int | None = None,
) -> list[dict[str, Threshold]]:
    """For each θ, each group's exact cut: two passes over the scores, for any number of θ.

    Raises:
        UserError: as `keep_top`.
    """
    for theta in thetas:
        check_theta(theta)
    goals = [partial(ScoreHistogram.crossing_share, theta=theta) for theta in thetas]
    return _cuts(scores, goals, group_of or whole_adapter, workers)


def kept_counts(
    scores: Mapping[str, Tensor],
    thetas: Sequence[float],
    group_of: GroupOf | None = None,
    workers: int | None = None,
) -> list[int]:
    """How many elements each θ keeps."""
    return [sum(limit.kept for limit in cuts.values()) for cuts in find_thresholds(scores, thetas, group_of, workers)]


def theta_curve(
    scores: Mapping[str, Tensor],
    thetas: Sequence[float],
    group_of: GroupOf | None = None,
    workers: int | None = None,
) -> list[float]:
    """The share of all elements, in [0, 1], that each θ keeps: the "%param" columns of the paper's θ table."""
    elements = sum(tensor.numel() for tensor in scores.values())
    return [kept / elements for kept in kept_counts(scores, thetas, group_of, workers)]


def select_shards(
    paths: Sequence[Path],
    theta: float,
    output: Path,
    group_of: GroupOf | None = None,
    workers: int | None = None,
) -> dict[str, Threshold]:
    """Cut scores in safetensors files and write bool masks to `output` (safetensors), without loading either into
    memory.

    The files are shards of one adapter's scores: positions follow the sorted keys of all of them together.

    Returns:
        Each group's cut.

    Raises:
        UserError: as `keep_top`, or a file is missing, unreadable or repeats a key of another.
    """
    scores = ShardedScores(paths)
    [cuts] = find_thresholds(scores, [theta], group_of, workers)
    pieces = (mask for _, mask in mask_blocks(scores, cuts, group_of or whole_adapter, workers))
    write_masks(output, {key: tuple(scores[key].shape) for key in scores}, pieces)
    return cuts


def mask_blocks(
    scores: Mapping[str, Tensor],
    cuts: Mapping[str, Threshold],
    group_of: GroupOf = whole_adapter,
    workers: int | None = None,
) -> Iterator[tuple[Block, NDArray[np.bool_]]]:
    """Each block in position order with the bool mask of the elements that `cuts` keep."""
    ties_left = {group: limit.ties_kept for group, limit in cuts.items()}

    def compare(block: Block) -> tuple[Block, NDArray[np.bool_], NDArray[np.intp]]:
        bits, limit = checked_bits(block), cuts[group_of(block.key)]
        return block, bits >= limit.bits, np.flatnonzero(bits == limit.bits)

    for block, mask, ties in ordered_map(compare, blocks(scores), workers):
        group = group_of(block.key)
        mask[ties[ties_left[group] :]] = False
        ties_left[group] = max(ties_left[group] - ties.size, 0)
        yield block, mask


def _cuts(
    scores: Mapping[str, Tensor], goals: Sequence[Goal], group_of: GroupOf, workers: int | None
) -> list[dict[str, Threshold]]:
    histograms = count_scores(scores, group_of, workers)
    return cut(goals, histograms, lambda wanted: count_inside(scores, wanted, group_of, workers))


def _masks(
    scores: Mapping[str, Tensor], cuts: Mapping[str, Threshold], group_of: GroupOf, workers: int | None
) -> dict[str, Tensor]:
    masks = {key: torch.zeros(scores[key].shape, dtype=torch.bool) for key in sorted(scores)}
    for key, group in groupby(mask_blocks(scores, cuts, group_of, workers), lambda piece: piece[0].key):
        flat = masks[key].reshape(-1).numpy()
        for block, mask in group:
            flat[block.start : block.start + mask.size] = mask
    return masks
