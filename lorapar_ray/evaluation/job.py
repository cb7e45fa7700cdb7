"""Stage `evaluate`: the base, stage 1 and stage 2 on the test rows and on lm-eval's tasks, from the same engines."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lorapar_ray.capacity import needing
from lorapar_ray.config import Config
from lorapar_ray.datasets.chat import Encoder, load_encoder
from lorapar_ray.datasets.decoder import Decoding, decoding
from lorapar_ray.datasets.labelled import evaluation_table, require_room
from lorapar_ray.datasets.rows import count_rows
from lorapar_ray.datasets.tokens import UNLABELLED, Questions, Selection, TokenTable
from lorapar_ray.engines.kept import kept_engines
from lorapar_ray.engines.requests import Request
from lorapar_ray.errors import UserError
from lorapar_ray.evaluation.accuracy import accuracy
from lorapar_ray.evaluation.answers import AnswerStore
from lorapar_ray.evaluation.engines import Engines
from lorapar_ray.evaluation.generator import same_length, start_generator
from lorapar_ray.evaluation.judging import judge, judging_process
from lorapar_ray.evaluation.serving import Served, require_template, serving
from lorapar_ray.evaluation.stage import STAGE
from lorapar_ray.evaluation.task_files import unfinished
from lorapar_ray.evaluation.tasks import catalogue_of, evaluate_tasks
from lorapar_ray.files import atomic_path, digest, write_json
from lorapar_ray.grpo.rewards import RewardPool
from lorapar_ray.models import model_reference, resolve_model
from lorapar_ray.progress import console, progress
from lorapar_ray.runs import RunDirectory

AT_ONCE = 8192
"""Test rows whose requests and answers are in memory together."""
ANSWERS = pa.schema(
    [(name, pa.string()) for name in ("id", "task", "answer", "completion")] + [pa.field("right", pa.bool_())]
)
Rows = Sequence[dict[str, Any]]
Answered = Iterable[tuple[Rows, list[str], float]]
"""Some rows at a time with the texts that answer them, and the seconds that these took."""


def evaluate_stage(config: Config, run: RunDirectory) -> dict[str, Any]:
    """Write the results of each of `evaluate.models` on the test rows and the tasks; finished parts are kept.

    `eval/<name>.json` and `eval/<name>.parquet` are of the test rows; of the tasks see `lorapar_ray.evaluation.tasks`.
    Every model runs as its stock adapter on the original base, as it will be served.

    Questions that leave no room for an answer in `evaluate.engine.max_model_len` are skipped for all models, and listed
    in `rejects/evaluate.parquet`. An answer ends at the first of the model's end tokens and stop strings.

    Raises:
        UserError: there is nothing to evaluate on, no question is short enough, or an adapter or a task is missing.
    """
    return evaluate_together([(config, run)])[0]


def evaluate_together(members: Sequence[tuple[Config, RunDirectory]]) -> list[dict[str, Any]]:
    """`evaluate_stage` of several runs, one after the other on the same engines.

    Args:
        members: runs of one `engines_of`; returns what each one's manifest says.

    Raises:
        UserError: as `evaluate_stage`, of any of them.
    """
    parts = [part for config, run in members if (part := _Part.of(config, run)).waits]
    notes = [{"n": count_rows(run.data / "test.parquet")} for _, run in members]
    if not parts:
        return notes
    config = parts[0].config
    with needing("evaluate", STAGE.groups(config)):
        for part in parts:
            part.prepare()
        if config.adapter.method == "lora":
            _answer_by_engines(parts)
        else:
            for part in parts:
                with decoding(part.config.model) as decoder, judging_process(config.evaluate.answer) as process:
                    _answer_without_engine(part.config, part.run, decoder, part.asked, part.todo, process)
    return notes


def _answer_by_engines(parts: Sequence[_Part]) -> None:
    config = parts[0].config
    with _engines(config, [folder for part in parts for folder in part.adapters.values()]) as engines:
        with progress("engines", config.evaluate.engines, lambda: (0, "starting")):
            engines.start()
        for part in parts:
            if len(parts) > 1:
                console.print(f"  of {part.run.root.name}:")
            part.answer(engines)


def engines_of(config: Config) -> str:
    """A digest that is equal for runs that the same engines can evaluate."""
    names = ("engine", "engines", "max_engines", "resources", "serve")
    settings = {name: value for name, value in config.evaluate.model_dump(mode="json").items() if name in names}
    return digest([config.model.model_dump(mode="json"), config.adapter.method, settings])


@dataclass
class _Part:
    """The remaining work of one run's evaluation."""

    config: Config
    run: RunDirectory
    adapters: dict[str, Path | None]
    todo: dict[str, Path | None]
    """Models that have not answered the test rows."""
    tasks: bool
    """Whether a task of lm-eval is not finished."""
    asked: Rows = ()
    catalogue: Any = None
    encoder: Encoder | None = None

    @classmethod
    def of(cls, config: Config, run: RunDirectory) -> _Part:
        rows, settings = count_rows(run.data / "test.parquet"), config.evaluate
        if not rows and not settings.tasks:
            raise UserError("data.test: no rows to evaluate on; give at least one source, or evaluate.tasks")
        adapters = {name: _adapter(run, name) for name in config.evaluated}
        todo = {name: folder for name, folder in adapters.items() if rows and not (run.eval / f"{name}.json").is_file()}
        return cls(config, run, adapters, todo, bool(unfinished(run.eval, list(adapters), settings.tasks)))

    @property
    def waits(self) -> bool:
        return bool(self.todo) or self.tasks

    def prepare(self) -> None:
        """Checks before an engine starts."""
        self.catalogue = catalogue_of(self.config.evaluate) if self.tasks else None
        self.encoder = _encoder(self.config) if self.tasks else None
        self.asked = _questions(self.config, self.run) if self.todo else []

    def answer(self, engines: Engines) -> None:
        settings, answers = self.config.evaluate, self.run.work / "evaluate"
        if self.todo:
            with decoding(self.config.model) as decoder, judging_process(settings.answer) as process:
                for name, folder in self.todo.items():
                    served = Served(engines, folder, AnswerStore(answers / f"{name}-rows"))
                    _answer_rows(self.config, self.run, decoder, self.asked, name, served, process)
        if self.catalogue is not None and self.encoder is not None:
            evaluate_tasks(
                settings, self.catalogue, engines, self.adapters, self.encoder, root=self.run.eval, answers=answers
            )


def _encoder(config: Config) -> Encoder:
    """The tokenizer, in this process: lm-eval writes its prompts here."""
    model = config.model
    encoder = load_encoder(resolve_model(model.path), model.system_prompt, model.trust_remote_code)
    if config.evaluate.chat:
        require_template(encoder.tokenizer)
    return encoder


def _questions(config: Config, run: RunDirectory) -> Questions:
    """The test rows that leave room for an answer, as tokens, read on demand."""
    tokens, limit = evaluation_table(config, run), config.evaluate.engine.max_model_len
    chosen = Selection(str(tokens.resolve()), [UNLABELLED], "data.test", limit)
    require_room(run, TokenTable(tokens), [chosen], stage="evaluate", field="evaluate.engine.max_model_len")
    return Questions(chosen)


def _engines(config: Config, adapters: Sequence[Path | None]) -> Engines:
    settings, base = config.evaluate, model_reference(config.model.path)
    how = serving(base, adapters, settings.serve)
    running = kept_engines().take() if how["sync"] == "merged" else []  # as stage 2's are
    if running:
        console.print("  stage 2's engines answer")
    return Engines(
        base,
        settings.engine,
        settings.resources,
        settings.engines,
        most=settings.max_engines,
        seed=config.seed,
        trust_remote_code=config.model.trust_remote_code,
        running=running,
        **how,
    )


def _adapter(run: RunDirectory, name: str) -> Path | None:
    if name == "base":
        return None
    folder = run.trained(name) / "adapter"
    if not (folder / "adapter_config.json").is_file():
        raise UserError(
            f"evaluate.models: '{name}' needs '{folder}'; run `lorapar {name.partition('-')[0]}` first or leave it out"
        )
    return folder


def _answer_rows(
    config: Config,
    run: RunDirectory,
    decoder: Decoding,
    rows: Rows,
    name: str,
    served: Served,
    process: RewardPool,
) -> None:
    """One model's greedy answers to the test rows."""
    settings = config.evaluate
    ends = {"stop": list(settings.stop), "stop_token_ids": decoder.end_ids}
    sampling = {"n": 1, "temperature": 0.0, "max_tokens": settings.max_new_tokens, **ends}
    done = before = 0

    def count(n: int) -> None:
        nonlocal done
        done = before + n

    def answered() -> Answered:
        nonlocal before
        for some in _parts(rows):
            start = time.monotonic()
            requests = [Request("generate", row["prompt_ids"], sampling=sampling) for row in some]
            texts = decoder.texts([answer.tokens for answer in served.answers(requests, count)], settings.stop)
            before += len(some)
            yield some, texts, time.monotonic() - start

    with progress("evaluate", len(rows), lambda: (done, name)):
        result = _write(run, name, answered(), process)
    _say(result)


def _answer_without_engine(
    config: Config,
    run: RunDirectory,
    decoder: Decoding,
    rows: Rows,
    adapters: dict[str, Path | None],
    process: RewardPool,
) -> None:
    """The base and adapters that vLLM does not serve (learnt prompts, IA3), with transformers in a Ray actor."""
    import ray

    settings = config.evaluate
    actor = start_generator(config.model, model_reference(config.model.path), settings.resources)
    done: dict[str, Any] = {"n": 0, "name": "loading the model"}

    def answered() -> Answered:
        for some in _parts(rows):
            start = time.monotonic()
            prompts = [row["prompt_ids"] for row in some]
            found: list[list[int]] = [[] for _ in prompts]
            for part in same_length(prompts, settings.engine.max_num_seqs):
                answers = ray.get(actor.greedy.remote([prompts[row] for row in part], settings.max_new_tokens))
                for row, ids in zip(part, answers, strict=True):
                    found[row] = ids
                done["n"] += len(part)
            yield some, decoder.texts(found, settings.stop), time.monotonic() - start

    try:
        with progress("evaluate", len(rows) * len(adapters), lambda: (done["n"], done["name"])):
            for name, folder in adapters.items():
                ray.get(actor.load.remote(None if folder is None else run.address(folder)))
                done["name"] = name
                _say(_write(run, name, answered(), process))
    finally:
        ray.kill(actor)


def _parts(rows: Rows) -> Iterator[Rows]:
    return (rows[first : first + AT_ONCE] for first in range(0, len(rows), AT_ONCE))


def _write(run: RunDirectory, name: str, answered: Answered, process: RewardPool) -> dict[str, Any]:
    """Judge a model's answers and write `<name>.parquet` and `<name>.json`; returns the latter."""
    right: list[bool] = []
    tasks: list[str] = []
    unjudged, seconds = 0, 0.0
    with atomic_path(run.eval / f"{name}.parquet") as draft, pq.ParquetWriter(draft, ANSWERS) as writer:
        for rows, texts, took in answered:
            verdicts, lost = judge(process, rows, texts)
            columns = [
                {"id": row["id"], "task": row["task"], "answer": row["answer"], "completion": text, "right": ok}
                for row, text, ok in zip(rows, texts, verdicts, strict=True)
            ]
            writer.write_table(pa.Table.from_pylist(columns, ANSWERS))
            right += verdicts
            tasks += [row["task"] for row in rows]
            unjudged += lost
            seconds += took
    result = {"name": name, **accuracy(right, tasks), "seconds": round(seconds, 2)}
    if unjudged:
        result["unjudged"] = unjudged
    write_json(run.eval / f"{name}.json", result)
    return result


def _say(result: dict[str, Any]) -> None:
    name = result["name"]
    if lost := result.get("unjudged"):
        console.print(f"  {name}: {lost} answers could not be judged within the limits and count as wrong")
    low, high = result["interval"]
    console.print(f"  {name}: {result['accuracy']:.1%} [{low:.1%}, {high:.1%}] of {result['n']}")
