"""The stages that make results, in order, and which of their results are out of date."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorapar_ray import legacy
from lorapar_ray.config import Config
from lorapar_ray.evaluation.stage import STAGE as EVALUATE
from lorapar_ray.grpo.stage import STAGE as GRPO
from lorapar_ray.importance.stage import STAGE as SCORE
from lorapar_ray.labeling.stage import STAGE as LABEL
from lorapar_ray.partition.stage import STAGE as PARTITION
from lorapar_ray.runs import RunDirectory
from lorapar_ray.sft.stage import STAGE as SFT
from lorapar_ray.stages import Stage
from lorapar_ray.standing import Standing, standing_of

RESULTS: dict[str, Stage] = {stage.name: stage for stage in (LABEL, SCORE, PARTITION, SFT, GRPO, EVALUATE)}
TRAINING = ("sft", "grpo")
"""The stages that `order` arranges."""


def results_of(config: Config) -> tuple[str, ...]:
    """The stages of a run that make results, with the training stages as `order` has them."""
    names = tuple(RESULTS)
    first = names.index(TRAINING[0])
    rest = [name for name in names if name not in TRAINING]
    return (*rest[:first], *config.order, *rest[first:])


@dataclass(frozen=True)
class RunState:
    """The state of each stage of a run, and which results are not of what is in the run now."""

    standings: Mapping[str, Standing]
    """By stage, in order; what each one's own inputs and files say."""
    outdated: Mapping[str, tuple[str, ...]]
    """By stage, the reasons (see `outdated_results`)."""

    def stands(self, stage: str) -> bool:
        """Whether a stage has finished, and its results belong to what is in the run now."""
        return stage in self.standings and self.standings[stage].state == "done" and stage not in self.outdated


def state_of_run(config: Config, run: RunDirectory) -> RunState:
    """The state of a run under `config`; also of one written by an earlier version."""
    entries, prints = legacy.entries(config, run, RESULTS), run.fingerprints
    found = {name: standing_of(RESULTS[name], config, run, entries, prints) for name in results_of(config)}
    return RunState(found, outdated_results(config, entries, found))


def outdated_results(
    config: Config, entries: Mapping[str, Any], found: Mapping[str, Standing]
) -> dict[str, tuple[str, ...]]:
    """The stages whose results are not of what is in the run now, and why.

    They are of other inputs, are damaged, or need a stage that is out of date itself or has not finished; or the run's
    order leaves them out. So after a new cut the adapters are out of date, and their accuracies too. Partial results of
    the present inputs are not.

    Args:
        entries: of the manifest, by stage.
        found: each stage's own standing.
    """
    left_out = f"not in this run's order [{', '.join(config.order)}]"
    reasons: dict[str, tuple[str, ...]] = {
        name: (left_out,) for name in RESULTS if name in entries and name not in results_of(config)
    }
    for name in results_of(config):
        own = found[name]
        if own.state == "new":
            continue
        if own.state in ("changed", "damaged"):
            reasons[name] = own.why
            continue
        needs = [need for need in RESULTS[name].needs(config) if need in found]
        why = [f"{need} is out of date" for need in needs if need in reasons]
        why += [f"{need} has not finished" for need in needs if need not in reasons and found[need].state != "done"]
        if why:
            reasons[name] = tuple(why)
    return reasons


def said(reasons: Mapping[str, tuple[str, ...]]) -> str:
    """Stages and the reasons why each is out of date, as a list in words."""
    return ", ".join(f"{name} ({shortened(why)})" for name, why in reasons.items())


def shortened(why: tuple[str, ...], most: int = 4) -> str:
    """Some reasons, and how many more there are."""
    return "; ".join(why[:most]) + (f" and {len(why) - most} more" if len(why) > most else "")
