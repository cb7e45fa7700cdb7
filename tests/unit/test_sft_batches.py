"""The plan of a job: a step's examples do not depend on workers or packing; each example is used once."""

from collections import Counter
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorapar_ray.config import SftConfig
from lorapar_ray.sft.batches import deal, lay_out, plan_batches, split_validation, step_examples, steps_in

LENGTHS = st.lists(st.integers(2, 64), min_size=1, max_size=60)


def examples_by_step(plan, workers: int) -> list[list[int]]:  # type: ignore[no-untyped-def]
    block = workers * plan.micro_batch * plan.accumulation
    assert len(plan.rows) == plan.steps * block
    return [sorted(chain(*plan.rows[start : start + block])) for start in range(0, len(plan.rows), block)]


@settings(max_examples=60, deadline=None)
@given(
    lengths=LENGTHS,
    workers=st.integers(1, 4),
    batch=st.integers(1, 20),
    micro=st.integers(1, 8),
    packing=st.booleans(),
    bucketing=st.booleans(),
    epochs=st.sampled_from([0.5, 1, 2]),
)
def test_steps_are_the_same_for_any_workers_and_layout(
    lengths: list[int], workers: int, batch: int, micro: int, packing: bool, bucketing: bool, epochs: float
) -> None:
    options = {"batch_size": batch, "epochs": epochs, "max_length": 64, "length_bucketing": bucketing}
    plain = SftConfig(**options, micro_batch_size=1)
    other = SftConfig(**options, micro_batch_size=micro, packing=packing)
    one, many = plan_batches(lengths, plain, 1, seed=3), plan_batches(lengths, other, workers, seed=3)
    assert one.steps == many.steps == steps_in(plain, len(lengths))
    assert examples_by_step(one, 1) == examples_by_step(many, workers)
    assert all(sum(lengths[example] for example in row) <= 64 for row in many.rows)
    assert many.micro_batch <= micro


@given(lengths=LENGTHS, bucketing=st.booleans())
def test_an_epoch_sees_every_example_once(lengths: list[int], bucketing: bool) -> None:
    steps = step_examples(lengths, SftConfig(batch_size=4, epochs=2, length_bucketing=bucketing), seed=1)
    assert Counter(chain(*steps)) == dict.fromkeys(range(len(lengths)), 2)
    first, second = steps[: len(steps) // 2], steps[len(steps) // 2 :]
    assert sorted(chain(*first)) == sorted(chain(*second)) == list(range(len(lengths)))
    few = 48 if bucketing else 12  # as many as may have the same order again by chance: 11 buckets, or 11 examples
    assert len(lengths) < few or first != second


def test_buckets_of_equal_lengths_are_drawn_anew_in_every_epoch() -> None:
    steps = step_examples([2] * 16, SftConfig(batch_size=4, epochs=2, length_bucketing=True), seed=1)
    first, second = ({frozenset(step) for step in epoch} for epoch in (steps[:4], steps[4:]))
    assert first != second


def test_bucketing_pads_less() -> None:
    lengths = [2 + (7 * i) % 61 for i in range(200)]

    def padded(bucketing: bool) -> int:
        steps = step_examples(lengths, SftConfig(batch_size=8, length_bucketing=bucketing), seed=0)
        return sum(len(step) * max(lengths[i] for i in step) for step in steps)

    assert padded(True) < 0.7 * padded(False)


def test_packing_fills_rows() -> None:
    assert lay_out([0, 1, 2, 3], [5, 3, 6, 2], capacity=8) == [(2, 3), (0, 1)]
    assert lay_out([0, 1, 2], [5, 3, 6], capacity=None) == [(2,), (0,), (1,)]


def test_a_short_last_step_is_spread_over_the_workers() -> None:
    rows = [(0,), (1,), (2,)]
    assert deal(rows, micro_batches=2, size=4) == [(0,), (), (), (), (1,), (2,), (), ()]


@pytest.mark.parametrize(("count", "share", "held_out"), [(10, 0.0, 0), (10, 0.2, 2), (10, 0.001, 1), (2, 0.9, 1)])
def test_validation_rows_are_held_out(count: int, share: float, held_out: int) -> None:
    train, validation = split_validation(count, share, seed=0)
    assert len(validation) == held_out
    assert sorted(train + validation) == list(range(count))
    assert (train, validation) == split_validation(count, share, seed=0)
