"""Stage `partition`: the elements that each training stage may change."""

from __future__ import annotations

from typing import Any

from lorapar_ray.config import Config
from lorapar_ray.config.marks import Setting
from lorapar_ray.runs import RunDirectory
from lorapar_ray.stages import OUTPUTS_FOR, Settings, Stage, settings_of


def run(config: Config, run: RunDirectory) -> dict[str, Any]:
    """Cut the scored adapter, if any stage trains only a region.

    A training stage reads only its own mask: stage 1 is the same for every β.
    """
    from lorapar_ray.partition.job import partition_stage
    from lorapar_ray.partition.regions import STAGE_1, STAGE_2, load_regions, mask_digest

    if config.partitioned:
        partition_stage(config, run)
    if not config.partitioned or config.partition.regions != "stages":
        return {}
    regions = load_regions(run.partition / "regions.safetensors")[0]
    return {OUTPUTS_FOR: {"sft": mask_digest(regions, STAGE_1), "grpo": mask_digest(regions, STAGE_2)}}


def settings(config: Config) -> Settings:
    """Its own, and whether there is anything to cut."""
    return settings_of(config, "partition") | {"partitioned": Setting(config.partitioned, False)}


STAGE = Stage(
    name="partition",
    help="Cut the scored adapter at θ, α, β.",
    needs=lambda _: ("score",),
    settings=settings,
    unused=lambda config: () if config.partitioned else ("partition",),
    run=run,
    outputs=("partition",),
    uses_ray=lambda _: False,
)
