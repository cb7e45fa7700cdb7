"""Stage `evaluate`: greedy answers of the base, of stage 1 and of stage 2, from one engine that swaps policies."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lorapar_ray.adapters import read_adapter_state
from lorapar_ray.capacity import require
from lorapar_ray.config import Config
from lorapar_ray.datasets.decoder import Decoding, decoding
from lorapar_ray.datasets.labelled import evaluation_table, require_room
from lorapar_ray.datasets.rows import count_rows
from lorapar_ray.datasets.tokens import UNLABELLED, Questions, Selection, TokenTable
from lorapar_ray.engines.actor import start_engine
from lorapar_ray.engines.base_weights import unmergeable
from lorapar_ray.engines.policy import Policy, read_policy
from lorapar_ray.errors import UserError
from lorapar_ray.evaluation.accuracy import accuracy
from lorapar_ray.evaluation.generator import same_length, start_generator
from lorapar_ray.evaluation.judging import judge, judging_process
from lorapar_ray.grpo.rewards import RewardPool
from lorapar_ray.models import model_reference
from lorapar_ray.progress import console, progress
from lorapar_ray.runs import RunDirectory, atomic_path, write_json
from lorapar_ray.tasks import on_a_worker

QUESTIONS_PER_CALL = 16
"""All calls are made at once, so that the engine's batch stays full; they come back, and are counted, one by one."""


def evaluate_stage(config: Config, run: RunDirectory) -> dict[str, Any]:
    """Write `eval/<name>.json` and `eval/<name>.parquet` for each of `evaluate.models`; finished ones are kept.

    Every model runs as its stock adapter on the original base, which is how it will be served.

    Questions that leave no room for an answer in `evaluate.engine.max_model_len` are left out, for every model alike,
    and listed in `rejects/evaluate.parquet`. An answer ends at the first of the model's end tokens and stop strings.

    Raises:
        UserError: there are no test rows, none is short enough, or an adapter that is to be evaluated is missing.
    """
    count = count_rows(run.data / "test.parquet")
    if not count:
        raise UserError("data.test: no rows to evaluate on; give at least one source")
    adapters = {name: _adapter(run, name) for name in config.evaluated}
    todo = {name: folder for name, folder in adapters.items() if not (run.eval / f"{name}.json").is_file()}
    if not todo:
        return {"n": count}
    settings = config.evaluate
    require("evaluate", {"resources": (1, settings.resources)})
    tokens = evaluation_table(config, run)
    chosen = Selection(str(tokens.resolve()), [UNLABELLED], "data.test", settings.engine.max_model_len)
    field = "evaluate.engine.max_model_len"
    require_room(run, TokenTable(tokens), [chosen], stage="evaluate", field=field)
    asked = list(Questions(chosen))
    with decoding(config.model) as decoder, judging_process(settings.answer) as process:
        if config.adapter.method == "lora":
            policies = {name: None if folder is None else read_policy(folder, 0) for name, folder in todo.items()}
            serving = _serving(model_reference(config.model.path), todo.values())
            _answer_all(config, run, decoder, asked, policies, process, **serving)
        else:
            _answer_without_engine(config, run, decoder, asked, todo, process)
    return {"n": len(asked)}


def _adapter(run: RunDirectory, name: str) -> Path | None:
    if name == "base":
        return None
    folder: Path = {"sft": run.sft, "grpo": run.grpo}[name] / "adapter"
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"evaluate.models: '{name}' needs '{folder}'; run `lorapar {name}` first or leave it out")
    return folder


def _serving(model: str, adapters: Iterable[Path | None]) -> dict[str, Any]:
    """How the engine is to serve the adapters: merged, or as LoRA where the base's files have other names for what they
    adapt."""
    states = [read_adapter_state(folder) for folder in adapters if folder is not None]
    if not any(on_a_worker(unmergeable, model, list(state)) for state in states):
        return {"sync": "merged"}
    ranks = [len(value) for state in states for key, value in state.items() if ".lora_A." in key]
    return {"sync": "adapter", "max_lora_rank": max(ranks)}


def _answer_all(
    config: Config,
    run: RunDirectory,
    decoder: Decoding,
    rows: list[dict[str, Any]],
    policies: dict[str, Policy | None],
    process: RewardPool,
    *,
    sync: str,
    max_lora_rank: int | None = None,
) -> None:
    import ray

    settings = config.evaluate
    actor = start_engine(
        model_reference(config.model.path),
        settings.engine,
        settings.resources,
        seed=config.seed,
        where="evaluate.engine",
        trust_remote_code=config.model.trust_remote_code,
        sync=sync,
        max_lora_rank=max_lora_rank,
    )
    prompts = [row["prompt_ids"] for row in rows]
    ends = {"stop": list(settings.stop), "stop_token_ids": decoder.end_ids}
    sampling = {"n": 1, "temperature": 0.0, "max_tokens": settings.max_new_tokens, **ends}
    done: dict[str, Any] = {"n": 0, "name": "starting the engine"}
    try:
        with progress("evaluate", len(rows) * len(policies), lambda: (done["n"], done["name"])):
            ray.get(actor.start.remote())
            for name, policy in policies.items():
                done["name"] = name
                start = time.monotonic()
                loaded = ray.get(actor.load_policy.remote(policy))
                if policy is not None and loaded != policy.digest:
                    raise RuntimeError(f"the engine loaded another adapter than '{name}': {loaded}")
                asked = {actor.generate.remote(part, sampling): len(part) for part in _batched(prompts)}
                waiting = list(asked)
                while waiting:
                    [answered], waiting = ray.wait(waiting)
                    done["n"] += asked[answered]
                answers = [group[0].token_ids for call in asked for group in ray.get(call)]
                texts = decoder.texts(answers, settings.stop)
                _write(run, name, rows, texts, process, time.monotonic() - start)
    finally:
        ray.kill(actor)


def _answer_without_engine(
    config: Config,
    run: RunDirectory,
    decoder: Decoding,
    rows: list[dict[str, Any]],
    adapters: dict[str, Path | None],
    process: RewardPool,
) -> None:
    """The base and adapters that no engine serves (learnt prompts, IA3), by transformers on a Ray actor."""
    import ray

    settings = config.evaluate
    prompts = [row["prompt_ids"] for row in rows]
    actor = start_generator(config.model, model_reference(config.model.path), settings.resources)
    done: dict[str, Any] = {"n": 0, "name": "loading the model"}
    try:
        with progress("evaluate", len(rows) * len(adapters), lambda: (done["n"], done["name"])):
            for name, folder in adapters.items():
                ray.get(actor.load.remote(None if folder is None else str(folder.resolve())))
                done["name"] = name
                start = time.monotonic()
                answered: list[list[int]] = [[] for _ in prompts]
                for part in same_length(prompts, settings.engine.max_num_seqs):
                    answers = ray.get(actor.greedy.remote([prompts[row] for row in part], settings.max_new_tokens))
                    for row, ids in zip(part, answers, strict=True):
                        answered[row] = ids
                    done["n"] += len(part)
                texts = decoder.texts(answered, settings.stop)
                _write(run, name, rows, texts, process, time.monotonic() - start)
    finally:
        ray.kill(actor)


def _batched(prompts: list[list[int]]) -> Iterator[list[list[int]]]:
    for first in range(0, len(prompts), QUESTIONS_PER_CALL):
        yield prompts[first : first + QUESTIONS_PER_CALL]


def _write(
    run: RunDirectory, name: str, rows: list[dict[str, Any]], texts: list[str], process: RewardPool, seconds: float
) -> None:
    right, lost = judge(process, rows, texts)
    columns = [
        {"id": row["id"], "task": row["task"], "answer": row["answer"], "completion": text, "right": ok}
        for row, text, ok in zip(rows, texts, right, strict=True)
    ]
    with atomic_path(run.eval / f"{name}.parquet") as draft:
        pq.write_table(pa.Table.from_pylist(columns), draft)
    result = {"name": name, **accuracy(right, [row["task"] for row in rows]), "seconds": round(seconds, 2)}
    if lost:
        result["unjudged"] = lost
        console.print(f"  {name}: {lost} answers could not be judged within the limits and count as wrong")
    write_json(run.eval / f"{name}.json", result)
    low, high = result["interval"]
    console.print(f"  {name}: {result['accuracy']:.1%} [{low:.1%}, {high:.1%}] of {result['n']}")
