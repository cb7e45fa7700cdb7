"""Stage `score` on Ray Train: every LoRA element's importance for each System.

Work is cut into fixed units of examples. A unit's partial sums are written once, by an atomic rename, and a unit that
is already there is skipped; so a lost worker, a resumed run or another number of workers cannot count a row twice, and
the sums (taken in unit order) have the same bits. No row is lost to equal splitting, since workers share nothing, or
(`score.sharding: fsdp2`) nothing but the base.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorapar_ray.boundary import read_json
from lorapar_ray.config import Config, ModelConfig, ScoreConfig
from lorapar_ray.datasets.chat import load_encoder
from lorapar_ray.datasets.labelled import encode_rows, labelled_rows
from lorapar_ray.errors import UserError
from lorapar_ray.importance.halves import Halves, half_scores, save_halves
from lorapar_ray.importance.units import finished_units, sum_units, write_units
from lorapar_ray.progress import progress
from lorapar_ray.runs import RunDirectory, atomic_path
from lorapar_ray.student import base_path
from lorapar_ray.workers import run_workers

if TYPE_CHECKING:
    from torch import Tensor

SYSTEMS = (1, 2)


def score_stage(config: Config, run: RunDirectory) -> dict[str, Any]:
    """Score `adapter/` for each System; writes `scores/`.

    Raises:
        UserError: a System without rows, or a score that is zero everywhere.
    """
    samples = {system: scored_rows(config, run, system) for system in SYSTEMS}
    base = base_path(config.model, run)
    encoder = load_encoder(base, config.model.system_prompt, config.model.trust_remote_code)
    limit, field = config.score.max_length, "score.max_length"
    encoded = {
        system: encode_rows(encoder, run, rows, stage=f"score-system{system}", max_length=limit, field=field)
        for system, rows in samples.items()
    }
    units = {system: write_units(run, system, rows, config.score.unit_size) for system, rows in encoded.items()}
    every = [unit for of_system in units.values() for unit in of_system]
    pending = [unit for unit in every if not unit.is_file()]
    payload = {
        "model": config.model.model_dump(mode="json"),
        "score": config.score.model_dump(mode="json"),
        "base": base,
        "adapter": str(run.adapter.resolve()),
        "units": [str(unit.resolve()) for unit in pending],
    }

    def poll() -> tuple[int, str]:
        return sum(unit.is_file() for unit in every), "units"

    if pending:
        with progress("score", len(every), poll):
            run_workers(
                score_worker,
                payload,
                name="score",
                workers=config.score.workers,
                resources=config.score.resources,
                storage=run.work / "ray",
            )
    for system in SYSTEMS:
        _write_scores(config, run, system, units[system])
    save_halves(run.scores / "halves", halves_of_units(config, run))
    return {f"system{system}_examples": len(rows) for system, rows in encoded.items()}


def score_worker(payload: dict[str, Any]) -> None:
    """Score this worker's share of the units (a Ray Train function)."""
    import ray.train
    import torch

    from lorapar_ray.adapters import load_adapter
    from lorapar_ray.importance import gradient_sums
    from lorapar_ray.sharding import most_of_any_rank, shard_base
    from lorapar_ray.student import device, load_base

    context = ray.train.get_context()
    units = [Path(unit) for unit in payload["units"]]
    # the share is fixed by the whole list, for a restarted worker as for its fellows; what is done already is skipped
    mine = [u for u in units[context.get_world_rank() :: context.get_world_size()] if not u.is_file()]
    settings = ScoreConfig.model_validate(payload["score"])
    model_config = ModelConfig.model_validate(payload["model"])
    sharded, here = settings.sharding == "fsdp2", device()
    if not mine and not sharded:
        return
    base = load_base(model_config, payload["base"], on=torch.device("cpu") if sharded else here)
    if settings.gradient_checkpointing:
        base.gradient_checkpointing_enable()
    model = load_adapter(base, Path(payload["adapter"]), trainable=True)
    if sharded:
        shard_base(model, here)
    pad_id = load_encoder(payload["base"], None, model_config.trust_remote_code).tokenizer.pad_token_id
    passes = 0
    for unit in mine:
        batches = unit_batches(unit, settings.batch_size, pad_id)
        gradient_sums(model, batches).save(unit)
        passes += len(batches)
    if sharded:  # a rank with less to do keeps the others company: each pass needs every rank's part of the base
        company = unit_batches(units[0], 1, pad_id)[:1]
        for _ in range(most_of_any_rank(passes, here) - passes):
            gradient_sums(model, company)


def unit_batches(unit: Path, size: int, pad_id: int) -> list[dict[str, Tensor]]:
    """A unit's examples as padded batches of at most `size`."""
    from lorapar_ray.importance import TokenizedExample, collate

    examples = [TokenizedExample(**example) for example in read_json(unit.with_suffix(".json"))]
    examples.sort(key=lambda example: len(example.input_ids))  # equal lengths together: less padding to compute
    return [collate(examples[start : start + size], pad_id) for start in range(0, len(examples), size)]


def scored_rows(config: Config, run: RunDirectory, system: int) -> list[dict[str, Any]]:
    """The seeded sample of a System's rows that is scored."""
    rows = labelled_rows(run, [system], "score")
    random.Random(f"{config.seed}/score/{system}").shuffle(rows)
    return rows[: config.score.examples_per_system]


def halves_of_units(config: Config, run: RunDirectory) -> Iterator[Halves]:
    """Scores of the halves of each System's units of work, at no extra pass."""
    from lorapar_ray.adapters import read_adapter_state
    from lorapar_ray.importance import score

    phi = read_adapter_state(run.adapter)
    units1, units2 = (finished_units(run, system) for system in SYSTEMS)
    return half_scores(
        units1,
        units2,
        lambda sums, number: score(config.score.criterion, phi, sums, seed=config.seed + 1 + number),
    )


def _write_scores(config: Config, run: RunDirectory, system: int, units: list[Path]) -> None:
    from safetensors.torch import save_file

    from lorapar_ray.adapters import read_adapter_state
    from lorapar_ray.importance import score

    sums = sum_units(units)
    try:
        scores = score(config.score.criterion, read_adapter_state(run.adapter), sums, seed=config.seed)
    except UserError as error:
        raise UserError(f"System {system}: {error}") from error
    with atomic_path(run.scores / f"system{system}.safetensors") as draft:
        save_file(scores, draft, metadata={"criterion": config.score.criterion})
