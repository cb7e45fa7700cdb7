"""θ selection spread over a Ray cluster: the same passes as `select`, each task on its own range of keys.

For score files on storage that every node reads. Only counts are sent (half a megabyte per task and pass), never
scores; the result equals that of `select_shards`, ties included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lorapar_ray.partition.blocks import blocks, checked_bits
from lorapar_ray.partition.histogram import ScoreHistogram, Threshold, check_theta
from lorapar_ray.partition.passes import (
    Bins,
    FineCounts,
    GroupOf,
    Histograms,
    count_inside,
    count_scores,
    cut,
    merge_fine_counts,
    merge_histograms,
    whole_adapter,
)
from lorapar_ray.partition.select import mask_blocks
from lorapar_ray.partition.shards import ShardedScores, write_masks


def select_on_cluster(
    paths: Sequence[Path], theta: float, output: Path, *, tasks: int, group_of: GroupOf = whole_adapter
) -> dict[str, Threshold]:
    """As `select.select_shards`, by `tasks` Ray tasks; masks go to `output`/masks-00000.safetensors and so on.

    Args:
        paths: safetensors files of one adapter's scores, readable on every node.
        output: a directory, writable on every node.
        group_of: importable by name on the workers.

    Returns:
        Each group's cut.

    Raises:
        UserError: as `select_shards`.
    """
    check_theta(theta)
    runs = split_keys(ShardedScores(paths), tasks)
    histograms = merge_histograms(_everywhere(_count, [(paths, keys, group_of) for keys in runs]))

    def refine(wanted: Bins) -> FineCounts:
        return merge_fine_counts(_everywhere(_count_inside, [(paths, keys, wanted, group_of) for keys in runs]))

    [cuts] = cut([partial(ScoreHistogram.crossing_share, theta=theta)], histograms, refine)
    ties: dict[str, int] = {}
    for found in _everywhere(_count_ties, [(paths, keys, cuts, group_of) for keys in runs]):
        ties |= found
    limits = deal_ties(cuts, ties, group_of)
    files = (output / f"masks-{number:05d}.safetensors" for number in range(len(runs)))
    _everywhere(_write, [(paths, keys, limits, file) for keys, file in zip(runs, files, strict=False)])
    return cuts


def split_keys(scores: Mapping[str, Tensor], runs: int) -> list[list[str]]:
    """The sorted keys in at most `runs` consecutive runs of about equally many elements."""
    sizes = {key: scores[key].numel() for key in sorted(scores)}
    ends = np.cumsum(list(sizes.values()))
    run_of = (ends - 1) * runs // ends[-1] if ends.size else ends
    found = [[key for key, at in zip(sizes, run_of, strict=True) if at == run] for run in range(runs)]
    return [keys for keys in found if keys]


def deal_ties(cuts: Mapping[str, Threshold], ties: Mapping[str, int], group_of: GroupOf) -> dict[str, Threshold]:
    """Each key's number of kept ties: a group's kept ties are assigned to its keys in position order."""
    left = {group: limit.ties_kept for group, limit in cuts.items()}
    limits = {}
    for key in sorted(ties):
        group = group_of(key)
        here = min(left[group], ties[key])
        left[group] -= here
        limits[key] = replace(cuts[group], ties_kept=here)
    return limits


def _everywhere(function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    """`function` on each tuple of arguments, as Ray tasks; a failed task's original exception is raised."""
    import ray

    task = ray.remote(function)
    try:
        results: list[Any] = ray.get([task.remote(*each) for each in arguments])
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    return results


def _count(paths: Sequence[Path], keys: Sequence[str], group_of: GroupOf) -> Histograms:
    return count_scores(ShardedScores(paths, keys), group_of, workers=1)


def _count_inside(paths: Sequence[Path], keys: Sequence[str], wanted: Bins, group_of: GroupOf) -> FineCounts:
    here = {group: wanted[group] for group in {group_of(key) for key in keys}}
    return count_inside(ShardedScores(paths, keys), here, group_of, workers=1)


def _count_ties(
    paths: Sequence[Path], keys: Sequence[str], cuts: Mapping[str, Threshold], group_of: GroupOf
) -> dict[str, int]:
    ties = dict.fromkeys(keys, 0)
    for block in blocks(ShardedScores(paths, keys)):
        ties[block.key] += int((checked_bits(block) == cuts[group_of(block.key)].bits).sum())
    return ties


def _write(paths: Sequence[Path], keys: Sequence[str], limits: Mapping[str, Threshold], file: Path) -> None:
    scores = ShardedScores(paths, keys)
    pieces = (mask for _, mask in mask_blocks(scores, limits, str, workers=1))
    write_masks(file, {key: tuple(scores[key].shape) for key in scores}, pieces)
