"""θ selection, compared with an element-by-element ranking with fractions; and the random baseline of equal size."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lorapar_ray.errors import UserError
from lorapar_ray.partition import blocks
from lorapar_ray.partition.histogram import ScoreHistogram
from lorapar_ray.partition.select import (
    find_thresholds,
    keep_count,
    keep_top,
    kept_counts,
    random_kept,
    random_mask,
    select_shards,
    theta_curve,
)
from lorapar_ray.partition.shards import ShardedScores
from tests.unit.partition_scores import Scores, flat, skewed

torch.set_num_threads(1)

TIED = st.sampled_from([0.0, 2.0**-149, 0.5, 1.0, 1.0 + 2.0**-23])
DENORMAL = st.integers(0, 2**23).map(lambda mantissa: mantissa * 2.0**-149)
ANY_SIZE = st.floats(0, float(np.finfo(np.float32).max), width=32)
THETA = st.one_of(st.sampled_from([0.1, 0.5, 0.9, 0.95, 1.0, 1e-9]), st.floats(1e-6, 1.0))


@st.composite
def score_sets(draw: st.DrawFn) -> Scores:
    values = draw(st.sampled_from([TIED, DENORMAL, ANY_SIZE, st.one_of(TIED, DENORMAL, ANY_SIZE)]))
    keys = draw(st.lists(st.sampled_from(list("abcdefg")), min_size=1, max_size=4, unique=True))
    scores = {key: torch.tensor(draw(st.lists(values, min_size=1, max_size=20))) for key in keys}
    if not any(bool(score.any()) for score in scores.values()):
        scores[keys[0]][0] = 1.0
    return scores


def reference(scores: Scores, theta: float) -> list[bool]:
    """The definition: sort, add elements as fractions, stop at the first sum that reaches θ · ΣI."""
    values = [Fraction(value) for value in flat(scores).tolist()]
    if theta == 1:
        return [True] * len(values)
    goal, reached, kept = Fraction(str(theta)) * sum(values), Fraction(0), [False] * len(values)
    for position in sorted(range(len(values)), key=lambda position: (-values[position], position)):
        if reached >= goal:
            break
        reached += values[position]
        kept[position] = True
    return kept


@settings(max_examples=300, deadline=None)
@given(score_sets(), THETA)
def test_selection_is_the_sorted_walk(scores: Scores, theta: float) -> None:
    assert flat(keep_top(scores, theta, workers=1)).tolist() == reference(scores, theta)


@settings(max_examples=60, deadline=None)
@given(score_sets(), THETA, st.integers(1, 7), st.integers(1, 3), st.randoms(use_true_random=False))
def test_blocks_threads_and_dict_order_change_nothing(
    scores: Scores, theta: float, block: int, workers: int, r: Random
) -> None:
    shuffled = {key: scores[key] for key in r.sample(sorted(scores), len(scores))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK_ELEMENTS", block)
        assert flat(keep_top(shuffled, theta, workers=workers)).tolist() == reference(scores, theta)


@settings(max_examples=25, deadline=None)
@given(scores=score_sets(), theta=THETA, cut=st.integers(0, 4))
def test_sharded_files_give_the_same_masks(
    tmp_path_factory: pytest.TempPathFactory, scores: Scores, theta: float, cut: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    keys = sorted(scores, reverse=True)
    parts = [part for part in (keys[:cut], keys[cut:]) if part]
    paths = [folder / f"{number}.safetensors" for number in range(len(parts))]
    for path, part in zip(paths, parts, strict=True):
        save_file({key: scores[key] for key in part}, path)
    [threshold] = select_shards(paths, theta, folder / "mask.safetensors", workers=2).values()
    masks = load_file(folder / "mask.safetensors")
    expected = keep_top(scores, theta)
    assert masks.keys() == expected.keys()
    assert all(torch.equal(masks[key], expected[key]) for key in expected)
    assert threshold.kept == sum(reference(scores, theta))


def test_masks_keep_shapes_and_memory_layout_does_not_matter() -> None:
    scores = {"b": torch.rand(3, 5).T, "a": torch.rand(2, 3, 4)}
    masks = keep_top(scores, 0.5)
    assert list(masks) == ["a", "b"]
    assert {key: (mask.shape, mask.dtype) for key, mask in masks.items()} == {
        key: (score.shape, torch.bool) for key, score in scores.items()
    }
    assert flat(masks).tolist() == reference(scores, 0.5)


def test_theta_is_the_decimal_it_prints_as() -> None:
    # the double nearest to 0.9 is above 9/10, and would need a tenth element
    assert kept_counts({"a": torch.ones(10)}, [0.1, 0.3, 0.9]) == [1, 3, 9]


def test_theta_one_is_the_full_adapter_even_where_importance_is_zero() -> None:
    scores = {"a": torch.tensor([0.0, 1.0, 0.0])}
    assert keep_top(scores, 1.0)["a"].all()
    assert keep_top(scores, 0.999)["a"].tolist() == [False, True, False]


def test_tied_scores_go_to_the_earlier_position() -> None:
    scores = {"b": torch.full((4,), 2.0), "a": torch.tensor([1.0, 2.0])}
    assert flat(keep_top(scores, 0.5)).tolist() == [False, True, True, True, False, False]


def test_kept_share_grows_with_theta_as_the_paper_figures_do() -> None:
    curve = theta_curve(skewed(0, layers=8), [tenths / 10 for tenths in range(1, 11)])
    assert curve == sorted(curve)
    assert curve[0] < 0.03
    assert 0.3 < curve[8] < 0.7
    assert curve[9] == 1.0


def test_curve_agrees_with_the_masks() -> None:
    scores, thetas = skewed(1), [0.25, 0.5, 0.95]
    assert kept_counts(scores, thetas) == [int(flat(keep_top(scores, theta)).sum()) for theta in thetas]


def test_threshold_value_separates_kept_from_cut() -> None:
    scores = skewed(2)
    [cuts] = find_thresholds(scores, [0.8])
    kept = flat(keep_top(scores, 0.8))
    assert flat(scores)[kept].min().item() == cuts["adapter"].value > flat(scores)[~kept].max().item()


def test_groups_are_cut_separately() -> None:
    scores = {"x.0": torch.tensor([1e6, 1.0]), "y.0": torch.tensor([1e-6, 1e-12]), "x.1": torch.tensor([1e6])}
    masks = keep_top(scores, 0.9, group_of=lambda key: key.split(".")[0])
    for name in ("x", "y"):
        part = {key: score for key, score in scores.items() if key.startswith(name)}
        assert all(torch.equal(masks[key], mask) for key, mask in keep_top(part, 0.9).items())
    assert masks["y.0"].tolist() == [True, False]


def test_histograms_merge_exactly() -> None:
    bits = flat(skewed(3)).numpy().view(np.uint32)
    whole, merged = ScoreHistogram(), ScoreHistogram()
    whole.add(bits)
    for part in (bits[700:], bits[:33], bits[33:700]):
        other = ScoreHistogram()
        other.add(part)
        merged.merge(other)
    assert np.array_equal(whole.counts, merged.counts)
    assert np.array_equal(whole.low_sums, merged.low_sums)
    assert merged.importance == sum(Fraction(value) for value in flat(skewed(3)).tolist())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_impossible_scores_are_named(bad: float) -> None:
    with pytest.raises(UserError, match=r"'b': element 2 is"):
        keep_top({"a": torch.ones(3), "b": torch.tensor([1.0, -0.0, bad])}, 0.9)


def test_minus_zero_is_zero() -> None:
    assert keep_top({"a": torch.tensor([-0.0, 1.0])}, 0.9)["a"].tolist() == [False, True]


def test_selection_errors() -> None:
    with pytest.raises(UserError, match="every importance score is zero"):
        keep_top({"a": torch.zeros(3)}, 0.9)
    with pytest.raises(UserError, match="group 'b': every importance score is zero"):
        keep_top({"a": torch.ones(3), "b": torch.zeros(3)}, 0.9, group_of=lambda key: key)
    with pytest.raises(UserError, match=r"scores of 'a' are torch.float64"):
        keep_top({"a": torch.ones(3, dtype=torch.float64)}, 0.9)
    with pytest.raises(UserError, match="no importance scores"):
        keep_top({}, 0.9)
    for theta in (0.0, -0.1, 1.1, math.nan):
        with pytest.raises(UserError, match=r"partition.theta must be in \(0, 1\], got"):
            keep_top({"a": torch.ones(3)}, theta)


def test_shard_errors(tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(UserError, match="another shard already holds 'a'"):
        ShardedScores([path, path])
    with pytest.raises(UserError, match=r"none.safetensors' is missing"):
        ShardedScores([tmp_path / "none.safetensors"])
    path.write_bytes(b"not safetensors at all")
    with pytest.raises(UserError, match=r"one.safetensors' is damaged"):
        ShardedScores([path])


@pytest.mark.parametrize("count", [0, 1, 777, 2880])
def test_random_mask_has_the_size_asked_for(count: int) -> None:
    assert int(flat(random_mask(skewed(0), count, seed=3)).sum()) == count


def test_random_mask_depends_on_seed_and_keys_only() -> None:
    like = skewed(0)
    first, reordered = random_mask(like, 500, seed=1), random_mask(dict(reversed(like.items())), 500, seed=1)
    assert torch.equal(flat(first), flat(reordered))
    assert not torch.equal(flat(first), flat(random_mask(like, 500, seed=2)))


def test_random_mask_is_spread_evenly() -> None:
    masks = random_mask({key: torch.empty(10_000) for key in "abcd"}, 20_000, seed=0)
    # hypergeometric: the standard deviation of each count is 43
    assert all(abs(int(mask.sum()) - 5_000) < 250 for mask in masks.values())


def test_random_sets_overlap_as_much_as_the_chosen_ones() -> None:
    """So every region has the size of the one that it is a control of, whatever α and β are."""
    k1, k2 = (keep_top(skewed(seed), 0.8) for seed in (0, 1))
    drawn1, drawn2 = random_kept(k1, k2, seed=5)
    for chosen, drawn in (
        (flat(k1) & ~flat(k2), flat(drawn1) & ~flat(drawn2)),
        (flat(k1) & flat(k2), flat(drawn1) & flat(drawn2)),
        (flat(k2) & ~flat(k1), flat(drawn2) & ~flat(drawn1)),
    ):
        assert int(chosen.sum()) == int(drawn.sum()) > 0 and not torch.equal(chosen, drawn)
    again1, _ = random_kept(k1, k2, seed=6)
    assert not torch.equal(flat(drawn1), flat(again1))


def test_more_elements_than_exist_cannot_be_kept() -> None:
    for count in (-1, 4):
        with pytest.raises(ValueError, match="cannot keep"):
            keep_count({"a": torch.ones(3)}, count)
