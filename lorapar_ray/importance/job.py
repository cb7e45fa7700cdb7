"""Stage `score` on Ray Train: every LoRA element's importance for each System.

Work is cut into fixed units of examples. A unit's partial sums are written once, by an atomic rename, and a unit that
is already there is skipped; so a lost worker, a resumed run or another number of workers cannot count a row twice, and
the sums (taken in unit order) have the same bits. Workers never talk to each other: no row is lost to equal splitting.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from lorapar_ray.config import Config, ModelConfig, ScoreConfig
from lorapar_ray.datasets.chat import load_encoder
from lorapar_ray.datasets.labelled import encode_rows, labelled_rows
from lorapar_ray.errors import UserError
from lorapar_ray.progress import progress
from lorapar_ray.runs import RunDirectory, atomic_path, write_json
from lorapar_ray.student import base_path
from lorapar_ray.workers import run_workers

SYSTEMS = (1, 2)


def score_stage(config: Config, run: RunDirectory) -> dict[str, Any]:
    """Score `adapter/` for each System; writes `scores/`.

    Raises:
        UserError: a System without rows, or a score that is zero everywhere.
    """
    samples = {system: scored_rows(config, run, system) for system in SYSTEMS}
    work = run.work / "score"
    base = base_path(config.model, run)
    encoder = load_encoder(base, config.model.system_prompt, config.model.trust_remote_code)
    units: list[str] = []
    for system, rows in samples.items():
        examples = encode_rows(encoder, rows, config.score.max_length)
        for index, start in enumerate(range(0, len(examples), config.score.unit_size)):
            unit = work / f"system{system}" / f"unit-{index:05d}"
            if not unit.with_suffix(".safetensors").is_file():
                write_json(unit.with_suffix(".json"), examples[start : start + config.score.unit_size])
            units.append(str(unit.resolve()))
    payload = {
        "model": config.model.model_dump(mode="json"),
        "score": config.score.model_dump(mode="json"),
        "base": base,
        "adapter": str(run.adapter.resolve()),
        "units": units,
    }

    def poll() -> tuple[int, str]:
        return sum(Path(f"{unit}.safetensors").is_file() for unit in units), "units"

    if poll()[0] < len(units):
        with progress("score", len(units), poll):
            run_workers(
                score_worker,
                payload,
                name="score",
                workers=config.score.workers,
                resources=config.score.resources,
                storage=run.work / "ray",
            )
    for system in SYSTEMS:
        _write_scores(config, run, system, [Path(u) for u in units if f"/system{system}/" in u])
    return {f"system{system}_examples": len(rows) for system, rows in samples.items()}


def score_worker(payload: dict[str, Any]) -> None:
    """Score this worker's share of the unfinished units (a Ray Train function)."""
    import ray.train

    from lorapar_ray.adapters import load_adapter
    from lorapar_ray.importance import TokenizedExample, collate, gradient_sums
    from lorapar_ray.student import load_base

    context = ray.train.get_context()
    todo = [Path(unit) for unit in payload["units"] if not Path(f"{unit}.safetensors").is_file()]
    mine = todo[context.get_world_rank() :: context.get_world_size()]
    if not mine:
        return
    settings = ScoreConfig.model_validate(payload["score"])
    model_config = ModelConfig.model_validate(payload["model"])
    model = load_adapter(load_base(model_config, payload["base"]), Path(payload["adapter"]), trainable=True)
    pad_id = load_encoder(payload["base"], None, model_config.trust_remote_code).tokenizer.pad_token_id
    for unit in mine:
        examples = [TokenizedExample(**example) for example in json.loads(unit.with_suffix(".json").read_text())]
        examples.sort(key=lambda example: len(example.input_ids))  # equal lengths together: less padding to compute
        batches = (
            collate(examples[start : start + settings.batch_size], pad_id)
            for start in range(0, len(examples), settings.batch_size)
        )
        gradient_sums(model, batches).save(unit.with_suffix(".safetensors"))


def scored_rows(config: Config, run: RunDirectory, system: int) -> list[dict[str, Any]]:
    """The seeded sample of a System's rows that is scored."""
    rows = labelled_rows(run, [system], "score")
    random.Random(f"{config.seed}/score/{system}").shuffle(rows)
    return rows[: config.score.examples_per_system]


def _write_scores(config: Config, run: RunDirectory, system: int, units: list[Path]) -> None:
    """Sum the units in order; write the scores, and those of two halves of the examples as the noise control."""
    from safetensors.torch import save_file

    from lorapar_ray.adapters import read_adapter_state
    from lorapar_ray.importance import GradSums, score

    phi = read_adapter_state(run.adapter)
    halves = []
    for part in (units[0::2], units[1::2]):
        if not part:
            continue
        total = GradSums.load(part[0].with_suffix(".safetensors"))
        for unit in part[1:]:
            total.add(GradSums.load(unit.with_suffix(".safetensors")))
        halves.append(total)
    try:
        if len(halves) == 2:
            for letter, half in zip("ab", halves, strict=True):
                with atomic_path(run.scores / "halves" / f"system{system}{letter}.safetensors") as draft:
                    save_file(score(config.score.criterion, phi, half, seed=config.seed + ord(letter)), draft)
            halves[0].add(halves[1])
        with atomic_path(run.scores / f"system{system}.safetensors") as draft:
            metadata = {"criterion": config.score.criterion, "examples": str(halves[0].n)}
            save_file(score(config.score.criterion, phi, halves[0], seed=config.seed), draft, metadata=metadata)
    except UserError as error:
        raise UserError(f"System {system}: {error}") from error
