"""Stage `partition`: from the scores on disk to the regions each stage may train. Needs no model and no Ray."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from lorapar_ray.adapters.targets import layer_index, module_type
from lorapar_ray.config import Config
from lorapar_ray.errors import UserError
from lorapar_ray.partition.control import half_control
from lorapar_ray.partition.passes import whole_adapter
from lorapar_ray.partition.regions import assign_regions, save_regions
from lorapar_ray.partition.select import keep_top, random_mask
from lorapar_ray.partition.summary import summarise
from lorapar_ray.runs import RunDirectory, write_json

GROUPS: dict[str, Callable[[str], str]] = {
    "global": whole_adapter,
    "module_type": module_type,
    "layer": lambda key: str(layer_index(key)),
}


def partition_stage(config: Config, run: RunDirectory) -> dict[str, Any]:
    """Cut the adapter at θ, α, β; writes `partition/regions.safetensors` and `partition/summary.json`.

    Returns:
        the summary (see `partition.summary`), with the signal-or-noise control under `control`.

    Raises:
        UserError: the scores are missing, zero everywhere or not finite.
    """
    settings = config.partition
    scores = [_load(run.scores / f"system{system}.safetensors") for system in (1, 2)]
    kept = [keep_top(each, settings.theta, group_of=GROUPS[settings.scope]) for each in scores]
    if settings.mask == "random":
        kept = [
            random_mask(each, sum(int(mask.sum()) for mask in kept[index].values()), seed=config.seed + index)
            for index, each in enumerate(scores)
        ]
    regions = assign_regions(
        *kept, *scores, alpha=settings.alpha, beta=settings.beta, activation=settings.activation, seed=config.seed
    )
    summary = summarise(
        regions, scores1=scores[0], scores2=scores[1], theta=settings.theta, alpha=settings.alpha, beta=settings.beta
    )
    halves = [run.scores / "halves" / f"system{system}{half}.safetensors" for system in (1, 2) for half in "ab"]
    if all(half.is_file() for half in halves):
        summary["control"] = half_control(*(load_file(half) for half in halves), theta=settings.theta)
    save_regions(
        regions,
        run.partition / "regions.safetensors",
        theta=settings.theta,
        alpha=settings.alpha,
        beta=settings.beta,
    )
    write_json(run.partition / "summary.json", summary)
    return summary


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"'{path}' is missing; run `lorapar score` with this run directory first")
    return load_file(path)
