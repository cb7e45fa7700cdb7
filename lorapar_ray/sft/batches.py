"""The examples of each optimiser step, and their layout for the workers.

The plan of a whole job is computed in advance, as a pure function of the examples' lengths, the settings and the seed.
A step's examples do not depend on the number of workers, on packing or on interruptions; only the layout does. The loss
is a sum over response tokens divided by their number in the step, so the layout changes only the order of the
additions.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from lorapar_ray.config import SftConfig

BUCKET_STEPS = 50
"""With length bucketing: steps whose examples are sorted together before they are cut into batches."""


@dataclass(frozen=True)
class BatchPlan:
    """Rows in the order in which the trainer's sequential sampler deals them to the workers.

    Micro-batch k (rows k·micro_batch and following) goes to worker k mod workers; a step takes `accumulation` of them
    per worker.
    """

    rows: list[tuple[int, ...]]
    """Examples concatenated in one row (one example without packing; none: padding without loss)."""
    steps: int
    micro_batch: int
    """Rows per forward pass of one worker."""
    accumulation: int
    """Forward passes per worker and step."""


def plan_batches(lengths: Sequence[int], settings: SftConfig, workers: int, seed: int) -> BatchPlan:
    """The plan of a job over examples of the given lengths in tokens.

    Every step sees `settings.batch_size` examples (the last one of an epoch what is left), each example once an epoch.
    """
    steps = step_examples(lengths, settings, seed)
    laid = [lay_out(examples, lengths, settings.max_length if settings.packing else None) for examples in steps]
    most = max(len(rows) for rows in laid)
    micro = max(1, min(settings.micro_batch_size, ceil(most / workers)))
    accumulation = ceil(most / (workers * micro))
    rows = [row for step in laid for row in deal(step, workers * accumulation, micro)]
    return BatchPlan(rows, len(steps), micro, accumulation)


def steps_in(settings: SftConfig, examples: int) -> int:
    """Optimiser steps of a job over so many examples."""
    per_epoch = ceil(examples / settings.batch_size)
    return settings.max_steps or max(1, ceil(settings.epochs * per_epoch))


def step_examples(lengths: Sequence[int], settings: SftConfig, seed: int) -> list[list[int]]:
    """The examples of every step, epoch after epoch, each epoch in its own order."""
    total = steps_in(settings, len(lengths))
    steps: list[list[int]] = []
    epoch = 0
    while len(steps) < total:
        generator = random.Random(f"{seed}/sft/{epoch}")
        order = list(range(len(lengths)))
        generator.shuffle(order)
        steps += _bucketed(order, lengths, settings, generator) if settings.length_bucketing else _cut(order, settings)
        epoch += 1
    return steps[:total]


def lay_out(examples: Sequence[int], lengths: Sequence[int], capacity: int | None) -> list[tuple[int, ...]]:
    """A step's examples as rows, longest first; packed into as few rows of `capacity` tokens as best-fit finds."""
    ordered = sorted(examples, key=lambda example: (-lengths[example], example))
    if capacity is None:
        return [(example,) for example in ordered]
    rows: list[list[int]] = []
    room: list[int] = []
    for example in ordered:
        fitting = [index for index, left in enumerate(room) if left >= lengths[example]]
        if fitting:
            best = min(fitting, key=lambda index: room[index])
            rows[best].append(example)
            room[best] -= lengths[example]
        else:
            rows.append([example])
            room.append(capacity - lengths[example])
    return [tuple(row) for row in rows]


def deal(rows: Sequence[tuple[int, ...]], micro_batches: int, size: int) -> list[tuple[int, ...]]:
    """`rows` spread evenly over micro-batches, neighbours together, each padded to `size` with empty rows."""
    dealt: list[tuple[int, ...]] = []
    start = 0
    for number in range(micro_batches):
        end = len(rows) * (number + 1) // micro_batches
        dealt += [*rows[start:end], *[()] * (size - (end - start))]
        start = end
    return dealt


def validation_rows(count: int, share: float) -> int:
    """How many of `count` rows are held out for validation."""
    return 0 if share == 0 else min(count - 1, max(1, round(share * count)))


def split_validation(count: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """(training, validation) positions among `count` rows, in order; at least one each if `share` is above 0."""
    if share == 0:
        return list(range(count)), []
    order = list(range(count))
    random.Random(f"{seed}/validation").shuffle(order)
    held_out = set(order[: validation_rows(count, share)])
    return [row for row in range(count) if row not in held_out], sorted(held_out)


def _cut(order: Sequence[int], settings: SftConfig) -> list[list[int]]:
    size = settings.batch_size
    return [list(order[start : start + size]) for start in range(0, len(order), size)]


def _bucketed(
    order: Sequence[int], lengths: Sequence[int], settings: SftConfig, generator: random.Random
) -> list[list[int]]:
    """Batches of neighbours in length within a window of a shuffled epoch, the batches shuffled again."""
    batches: list[list[int]] = []
    window = BUCKET_STEPS * settings.batch_size
    for start in range(0, len(order), window):
        near = sorted(order[start : start + window], key=lambda example: lengths[example])  # stable: ties stay shuffled
        batches += _cut(near, settings)
    generator.shuffle(batches)
    return batches
