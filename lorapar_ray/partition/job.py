"""Stage `partition`: from the scores on disk to the regions each stage may train. Needs no model and no Ray."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorapar_ray.adapters.targets import layer_index, module_type
from lorapar_ray.boundary import boundary, read_tensors
from lorapar_ray.config import Config
from lorapar_ray.files import write_json
from lorapar_ray.importance.halves import load_halves
from lorapar_ray.importance.job import halves_of_units
from lorapar_ray.partition.control import control_curve, control_of_systems
from lorapar_ray.partition.passes import whole_adapter
from lorapar_ray.partition.regions import assign_regions, save_regions
from lorapar_ray.partition.select import keep_top, random_kept
from lorapar_ray.partition.summary import summarise
from lorapar_ray.partition.systems import FILE, SUMMARY, cut_systems, save_systems
from lorapar_ray.runs import RunDirectory

RESCORE = "run `lorapar score` again"
GROUPS: dict[str, Callable[[str], str]] = {
    "global": whole_adapter,
    "module_type": module_type,
    "layer": lambda key: str(layer_index(key)),
}


def partition_stage(config: Config, run: RunDirectory) -> dict[str, Any]:
    """Cut the adapter at θ, α, β; writes `partition/regions.safetensors` and `partition/summary.json`.

    With a region for each System it writes `partition/systems.safetensors` and `partition/systems.json` instead.

    Returns:
        the summary (see `partition.summary`), with the signal-or-noise control under `control` (see `control_curve`);
        or that of `partition.systems`, with the control under `control` (see `control_of_systems`).

    Raises:
        UserError: the scores are missing, zero everywhere or not finite.
    """
    with boundary("partition: the scores, the adapter and the sums of this run do not match", RESCORE):
        return _cut(config, run) if config.partition.regions == "stages" else _cut_systems(config, run)


def _cut(config: Config, run: RunDirectory) -> dict[str, Any]:
    settings = config.partition
    scores = [_load(run.scores / f"system{system}.safetensors") for system in (1, 2)]
    kept = [keep_top(each, settings.theta, group_of=GROUPS[settings.scope]) for each in scores]
    activation = settings.activation
    if settings.mask == "random":
        kept, activation = random_kept(kept[0], kept[1], config.seed), "random"
    if settings.mask == "swapped":
        kept, scores = kept[::-1], scores[::-1]
    regions = assign_regions(
        *kept, *scores, alpha=settings.alpha, beta=settings.beta, activation=activation, seed=config.seed
    )
    summary = summarise(
        regions, scores1=scores[0], scores2=scores[1], theta=settings.theta, alpha=settings.alpha, beta=settings.beta
    )
    summary["control"] = _control(config, run)
    save_regions(
        regions,
        run.partition / "regions.safetensors",
        theta=settings.theta,
        alpha=settings.alpha,
        beta=settings.beta,
    )
    write_json(run.partition / "summary.json", summary)
    return summary


def _cut_systems(config: Config, run: RunDirectory) -> dict[str, Any]:
    settings = config.partition
    assert settings.regions != "stages"
    masks, summary = cut_systems(
        {system: _load(run.scores / f"system{system}.safetensors") for system in config.scored},
        settings.theta,
        regions=settings.regions,
        random=settings.mask == "random",
        group_of=GROUPS[settings.scope],
        seed=config.seed,
    )
    for point in deque(load_halves(run.scores / "halves"), maxlen=1):  # of all examples
        summary["control"] = control_of_systems(point, theta=settings.theta, seed=config.seed)
    save_systems(masks, run.partition / FILE)
    write_json(run.partition / SUMMARY, summary)
    return summary


def _control(config: Config, run: RunDirectory) -> list[dict[str, Any]]:
    """The signal-or-noise control from the halves' scores; for runs of earlier versions from their units."""
    halves = run.scores / "halves"
    points = load_halves(halves) if halves.is_dir() else halves_of_units(config, run)
    return control_curve(points, theta=config.partition.theta, seed=config.seed)


def _load(path: Path) -> dict[str, Any]:
    return read_tensors(path, "run `lorapar score` with this run directory")
