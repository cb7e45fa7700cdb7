"""Partition: the adapter elements that each System needs, and those that each training stage may change."""

from typing import TYPE_CHECKING

from lorapar_ray.lazy import exports

if TYPE_CHECKING:
    from lorapar_ray.partition.control import half_control
    from lorapar_ray.partition.curves import theta_curves
    from lorapar_ray.partition.histogram import ScoreHistogram, Threshold
    from lorapar_ray.partition.regions import assign_regions, load_regions, save_regions, stage_mask
    from lorapar_ray.partition.scatter import scatter_sample
    from lorapar_ray.partition.select import (
        find_thresholds,
        keep_count,
        keep_top,
        kept_counts,
        random_mask,
        select_shards,
        theta_curve,
    )
    from lorapar_ray.partition.shards import ShardedScores
    from lorapar_ray.partition.summary import summarise

__all__ = [
    "ScoreHistogram",
    "ShardedScores",
    "Threshold",
    "assign_regions",
    "find_thresholds",
    "half_control",
    "keep_count",
    "keep_top",
    "kept_counts",
    "load_regions",
    "random_mask",
    "save_regions",
    "scatter_sample",
    "select_shards",
    "stage_mask",
    "summarise",
    "theta_curve",
    "theta_curves",
]

__getattr__ = exports(
    __name__,
    {
        "control": ("half_control",),
        "curves": ("theta_curves",),
        "histogram": (
            "ScoreHistogram",
            "Threshold",
        ),
        "regions": (
            "assign_regions",
            "load_regions",
            "save_regions",
            "stage_mask",
        ),
        "scatter": ("scatter_sample",),
        "select": (
            "find_thresholds",
            "keep_count",
            "keep_top",
            "kept_counts",
            "random_mask",
            "select_shards",
            "theta_curve",
        ),
        "shards": ("ShardedScores",),
        "summary": ("summarise",),
    },
)
