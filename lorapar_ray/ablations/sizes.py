"""How many elements a run trains, and the rank of a LoRA that has as many."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path

from lorapar_ray.boundary import damaged, open_tensors, read_object
from lorapar_ray.config import Config
from lorapar_ray.errors import UserError
from lorapar_ray.pipeline import pending
from lorapar_ray.runs import RunDirectory

RECUT = "remove this run's directory and run the same command again"
USUAL_SHARE = 0.4
"""About what θ = 0.9 keeps; a plan is made with it until the mask is cut."""


def rank_of_size(rank: int, share: float) -> int:
    """The rank, below `rank`, of a LoRA with about `share` of its elements: their number is proportional to the rank.

    Args:
        rank: above 1.
    """
    return min(rank - 1, max(1, round(share * rank)))


def trained_share(out: Path, arm: str, config: Config) -> float | None:
    """Of all elements, the share that stage 1 trains in an arm's runs; None if none of them has cut its mask yet.

    Args:
        config: of a run of the arm, with its seed.
    """
    for folder in _runs(out, arm, config.seed):
        run = RunDirectory(folder)
        if _is_cut(config, run):
            file = run.partition / "summary.json"
            with damaged(file, RECUT):
                return float(read_object(file, RECUT)["total"]["shares"]["trained_stage1"])
    return None


def _is_cut(config: Config, run: RunDirectory) -> bool:
    try:
        return not pending(config, run, ("label", "score", "partition"))
    except UserError:  # its manifest is damaged, which the run itself reports
        return False


def elements_of(folder: Path) -> int | None:
    """The number of elements of a run's adapter; None if it has none as safetensors.

    Raises:
        UserError: the file is damaged.
    """
    file = folder / "adapter" / "adapter_model.safetensors"
    if not file.is_file():
        return None
    opened = open_tensors(file, RECUT)
    with damaged(file, RECUT):
        return sum(prod(opened.get_slice(key).get_shape()) for key in opened.keys())  # noqa: SIM118 (no mapping)


def _runs(out: Path, arm: str, seed: int) -> Iterator[Path]:
    """The arm's runs with a seed, whatever their learning rate: those that are compared, and the sweep's."""
    for pattern in (f"{arm}-{seed}", f"{arm}-{seed}-*", f"sweep-{seed}/{arm}-*"):
        yield from (each.parent for each in sorted(out.glob(f"{pattern}/manifest.json")))
