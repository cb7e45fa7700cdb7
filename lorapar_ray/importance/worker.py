"""One worker of scoring: the warm-up, if any, then its share of the sums."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorapar_ray.config import ModelConfig, ScoreConfig
from lorapar_ray.datasets.tokens import Examples, Selection, TokenTable
from lorapar_ray.files import atomic_path
from lorapar_ray.importance.parts import Part, PartWriter, Plan, done_units
from lorapar_ray.storage.sight import wait_until_seen
from lorapar_ray.storage.workspace import publish, refresh

if TYPE_CHECKING:
    from torch import Tensor

    from lorapar_ray.importance.capture import Scorer

WINDOW = 8
"""Number of forward passes whose units are sorted by length together, for little padding and few partial batches."""


@dataclass(frozen=True)
class ScoreJob:
    """A scoring job, JSON-like so that it can be sent to the workers."""

    model: dict[str, Any]
    score: dict[str, Any]
    base: str
    adapter: str
    samples: dict[str, dict[str, Any]]
    """For each System the fields of a `Selection`."""
    sums: str
    """Folder of the running sums."""
    phase: str
    """File to which rank 0 writes its progress."""
    warm_up: dict[str, Any] | None
    """An `SftJob` to do first, whose result is `adapter`."""

    def payload(self) -> dict[str, Any]:
        return asdict(self)


def score_worker(payload: dict[str, Any]) -> None:
    """Warm the adapter up if requested, then add this worker's share of the examples (a Ray Train function)."""
    import ray.train

    job = ScoreJob(**payload)
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    _find_adapter(job, rank, world)
    _say(job, rank, "loading the model")
    settings = ScoreConfig.model_validate(job.score)
    samples = {int(system): Selection(**fields) for system, fields in job.samples.items()}
    tables = {system: TokenTable(Path(chosen.path)) for system, chosen in samples.items()}
    examples = {
        system: Examples(tables[system], chosen.positions(tables[system]), chosen.max_length)
        for system, chosen in samples.items()
    }
    plan = Plan({system: len(rows) for system, rows in examples.items()}, settings.unit_size)
    folder = Path(job.sums)
    share = list(_share(plan, folder, rank, world))
    if share or settings.sharding != "none":
        _score(job, settings, examples, plan, share, rank)


def _find_adapter(job: ScoreJob, rank: int, world: int) -> None:
    """Wait until this rank sees the adapter, after the warm-up if rank 0 sees that it is still to do."""
    from lorapar_ray.collectives import of_rank_0

    config = Path(job.adapter) / "adapter_config.json"
    if of_rank_0(job.warm_up is not None and not config.is_file(), world):
        _warm_up(job, rank, world)
    if rank != 0:
        wait_until_seen(config, config.is_file)


def _warm_up(job: ScoreJob, rank: int, world: int) -> None:
    import torch.distributed as dist

    from lorapar_ray.sft.worker import train_worker
    from lorapar_ray.student import free_model_memory

    assert job.warm_up is not None
    _say(job, rank, "warm-up")
    train_worker(job.warm_up)
    free_model_memory()
    publish()
    if world > 1:
        dist.barrier()  # rank 0 writes the adapter
    if rank != 0:
        refresh(job.adapter)


def _say(job: ScoreJob, rank: int, phase: str) -> None:
    if rank == 0:
        with atomic_path(Path(job.phase)) as draft:
            draft.write_text(phase, encoding="utf-8")


def _share(plan: Plan, folder: Path, rank: int, world: int) -> Iterator[tuple[Part, list[int]]]:
    """This worker's units of each part that no sums hold yet: fixed by their number, see `parts`."""
    number = 0
    for part, units in plan.parts():
        mine = [unit for offset, unit in enumerate(units, start=number) if offset % world == rank]
        number += len(units)
        left = sorted(set(mine) - done_units(folder, part)) if mine else []
        if left:
            yield part, left


def _score(
    job: ScoreJob,
    settings: ScoreConfig,
    examples: dict[int, Examples],
    plan: Plan,
    share: Sequence[tuple[Part, list[int]]],
    rank: int,
) -> None:
    from lorapar_ray.collectives import most_of_any_rank
    from lorapar_ray.importance.batching import TOKENS
    from lorapar_ray.importance.capture import scoring
    from lorapar_ray.packed_attention import packs
    from lorapar_ray.sharding import load_student
    from lorapar_ray.student import device, load_tokenizer

    model_config = ModelConfig.model_validate(job.model)
    sharded, here = settings.sharding != "none", device()
    model = load_student(model_config, job.base, Path(job.adapter), settings.sharding)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    pad_id = load_tokenizer(job.base, model_config).pad_token_id
    tokens = settings.batch_tokens or TOKENS.get(here.type, TOKENS["cuda"])
    packed = packs(model)
    _say(job, rank, "scoring")

    def batches(rows: Sequence[dict[str, Any]]) -> list[dict[str, Tensor]]:
        return cut(rows, tokens, settings.batch_size, None if packed else pad_id)

    passes = 0
    with scoring(model) as scorer:
        for part, units in share:
            passes += _add_part(scorer, job, settings, examples[part.system], plan, part, units, tokens, batches)
        if sharded:  # each pass needs every rank's part of the base: dummy passes for a rank with less to do
            spare = batches([examples[min(examples)][0]])
            unused = scorer.new_sums()
            for _ in range(most_of_any_rank(passes, here) - passes):
                scorer.add(spare[0], unused)


def _add_part(
    scorer: Scorer,
    job: ScoreJob,
    settings: ScoreConfig,
    rows: Examples,
    plan: Plan,
    part: Part,
    units: Sequence[int],
    tokens: int,
    batches: Any,
) -> int:
    """Add a part's units, saving regularly; returns the number of passes."""
    sums, writer, passes = scorer.new_sums(), PartWriter(Path(job.sums), part), 0
    saved = time.monotonic()
    for window in windows(units, plan, part.system, rows.lengths, WINDOW * tokens):
        some = batches([rows[each] for unit in window for each in plan.of_unit(part.system, unit)])
        for batch in some:
            scorer.add(batch, sums)
        passes += len(some)
        writer.units += window
        if time.monotonic() - saved >= settings.checkpoint_every_s:
            writer.save(sums)
            saved = time.monotonic()
    writer.save(sums)
    return passes


def windows(units: Sequence[int], plan: Plan, system: int, lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Consecutive units of about `tokens` tokens together."""
    window: list[int] = []
    held = 0
    for unit in units:
        window.append(unit)
        held += sum(lengths[each] for each in plan.of_unit(system, unit))
        if held >= tokens:
            yield window
            window, held = [], 0
    if window:
        yield window


def cut(rows: Sequence[dict[str, Any]], tokens: int, most: int | None, pad_id: int | None) -> list[dict[str, Tensor]]:
    """Batches of at most `tokens` tokens and `most` examples: packed, or padded with `pad_id`."""
    from lorapar_ray.importance.batching import TokenizedExample, by_cost, collate, pack

    examples = [TokenizedExample("", row["input_ids"], row["response_start"]) for row in rows]
    lengths = [len(example.input_ids) for example in examples]
    found = []
    for batch in by_cost(lengths, tokens, padded=pad_id is not None):
        for start in range(0, len(batch), most or len(batch)):
            some = [examples[each] for each in batch[start : start + (most or len(batch))]]
            found.append(pack(some) if pad_id is None else collate(some, pad_id))
    return found
