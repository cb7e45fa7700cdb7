"""The algebra of the regions, and their summary, curves, control and scatter plot."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import save_file

from lorapar_ray.errors import UserError
from lorapar_ray.importance import GradSums
from lorapar_ray.importance.halves import Halves, half_scores, load_halves, save_halves
from lorapar_ray.partition.control import average_ranks, control_curve, half_control
from lorapar_ray.partition.curves import theta_curves
from lorapar_ray.partition.regions import assign_regions, load_regions, round_half_up, save_regions, stage_mask
from lorapar_ray.partition.scatter import scatter_sample
from lorapar_ray.partition.select import keep_top, theta_curve
from lorapar_ray.partition.summary import summarise
from tests.unit.partition_scores import Scores, flat, skewed

torch.set_num_threads(1)


def two_systems(theta: float = 0.9) -> tuple[Scores, Scores, Scores, Scores]:
    scores1, scores2 = skewed(10), skewed(11)
    mixed = {key: scores2[key] + scores1[key] for key in scores1}
    return keep_top(scores1, theta), keep_top(mixed, theta), scores1, mixed


@pytest.mark.parametrize("activation", ["importance", "random"])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_region_algebra(alpha: float, beta: float, activation: Literal["importance", "random"]) -> None:
    k1, k2, scores1, scores2 = two_systems()
    regions = assign_regions(k1, k2, scores1, scores2, alpha=alpha, beta=beta, activation=activation, seed=5)
    one, two = flat(k1), flat(k2)
    stage1, stage2 = flat(stage_mask(regions, 1)), flat(stage_mask(regions, 2))
    shared = one & two
    assert torch.equal(flat(regions) & 3, one + 2 * two)
    assert torch.equal(stage1 & ~shared, one & ~two)
    assert torch.equal(stage2 & ~shared, two & ~one)
    assert int((stage1 & shared).sum()) == round_half_up(alpha, int(shared.sum()))
    assert int((stage2 & shared).sum()) == round_half_up(beta, int(shared.sum()))


def test_activation_takes_the_most_important_of_shared_for_each_system() -> None:
    k1, k2, scores1, scores2 = two_systems()
    regions = assign_regions(k1, k2, scores1, scores2, alpha=0.4, beta=0.6)
    shared = flat(k1) & flat(k2)
    for mask, scores in ((stage_mask(regions, 1), scores1), (stage_mask(regions, 2), scores2)):
        active = flat(mask) & shared
        assert flat(scores)[active].min() > flat(scores)[shared & ~active].max()


def test_activation_ties_by_position() -> None:
    everything, level = {"a": torch.ones(5, dtype=torch.bool)}, {"a": torch.ones(5)}
    regions = assign_regions(everything, everything, level, level, alpha=0.5, beta=0.2)
    assert stage_mask(regions, 1)["a"].tolist() == [True, True, True, False, False]  # 2.5 rounds half up
    assert stage_mask(regions, 2)["a"].tolist() == [True, False, False, False, False]


def test_random_activation_is_seeded_and_differs_between_stages() -> None:
    systems = two_systems()
    first, again, other = (
        assign_regions(*systems, alpha=0.5, beta=0.5, activation="random", seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(flat(first), flat(again))
    assert not torch.equal(flat(first), flat(other))
    shared = flat(systems[0]) & flat(systems[1])
    assert not torch.equal(flat(stage_mask(first, 1)) & shared, flat(stage_mask(first, 2)) & shared)


def test_disjoint_systems_share_nothing() -> None:
    k1, k2 = {"a": torch.tensor([True, False])}, {"a": torch.tensor([False, True])}
    level = {"a": torch.ones(2)}
    assert assign_regions(k1, k2, level, level, alpha=1.0, beta=1.0)["a"].tolist() == [1 | 4, 2 | 8]


def test_region_errors() -> None:
    k1, k2, scores1, scores2 = two_systems()
    with pytest.raises(UserError, match=r"partition.alpha must be in \[0, 1\], got 1.5"):
        assign_regions(k1, k2, scores1, scores2, alpha=1.5, beta=0.5)
    with pytest.raises(UserError, match=r"partition.beta must be in \[0, 1\], got -0.5"):
        assign_regions(k1, k2, scores1, scores2, alpha=0.5, beta=-0.5)
    with pytest.raises(UserError, match="only one of them"):
        assign_regions(k1, {**k2, "z": torch.ones(1, dtype=torch.bool)}, scores1, scores2, alpha=0.5, beta=0.5)
    with pytest.raises(UserError, match="has shapes"):
        assign_regions(k1, {key: mask.T for key, mask in k2.items()}, scores1, scores2, alpha=0.5, beta=0.5)


def test_regions_survive_the_disk(tmp_path: Path) -> None:
    regions = assign_regions(*two_systems(), alpha=0.5, beta=1.0)
    path = tmp_path / "partition" / "regions.safetensors"
    save_regions(regions, path, theta=0.9, alpha=0.5, beta=1.0)
    loaded, settings_ = load_regions(path)
    assert settings_ == {"theta": 0.9, "alpha": 0.5, "beta": 1.0}
    assert loaded.keys() == regions.keys()
    assert all(torch.equal(loaded[key], regions[key]) for key in regions)
    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(UserError, match="does not hold regions"):
        load_regions(path)


def test_summary_counts_what_the_regions_hold() -> None:
    k1, k2, scores1, scores2 = two_systems()
    regions = assign_regions(k1, k2, scores1, scores2, alpha=0.5, beta=1.0)
    summary = summarise(regions, theta=0.9, alpha=0.5, beta=1.0, scores1=scores1, scores2=scores2)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    one, two = flat(k1), flat(k2)
    total = summary["total"]
    assert total["elements"] == one.numel()
    assert total["counts"]["system1_only"] == int((one & ~two).sum())
    assert total["counts"]["none"] == int((~one & ~two).sum())
    assert total["counts"]["trained_stage1"] == int(flat(stage_mask(regions, 1)).sum())
    assert sum(total["shares"][name] for name in ("system1_only", "system2_only", "shared", "none")) == pytest.approx(1)
    assert summary["overlap"]["jaccard"] == int((one & two).sum()) / int((one | two).sum())
    assert sum(summary["overlap"].values()) == pytest.approx(1)
    for table in ("by_module", "by_matrix", "by_layer"):
        assert sum(row["elements"] for row in summary[table].values()) == one.numel()
        for name, count in total["counts"].items():
            assert sum(row["counts"][name] for row in summary[table].values()) == count
    assert set(summary["by_module"]) == {"q", "k", "v", "gate", "up", "down"}
    assert list(summary["by_layer"]) == ["0", "1"]
    assert "q.A" in summary["by_matrix"]
    heat = summary["heat"]
    place = heat["layers"].index(1), heat["matrices"].index("up.B")
    up_b = next(key for key in k1 if ".1." in key and "up_proj.lora_B" in key)
    assert heat["system1"][place[0]][place[1]] == pytest.approx(float(k1[up_b].double().mean()))
    assert heat["system2"][place[0]][place[1]] == pytest.approx(float(k2[up_b].double().mean()))
    assert summary["curves"]["qkvgud"]["jaccard"][8] == summary["overlap"]["jaccard"]


def test_theta_curves_rank_each_subset_on_its_own() -> None:
    scores1, scores2 = skewed(4), skewed(5)
    curves = theta_curves(scores1, scores2, [0.5, 0.9, 1.0])
    attention = {key: score for key, score in scores1.items() if "self_attn" in key}
    assert curves["qkv"]["system1"] == theta_curve(attention, [0.5, 0.9, 1.0])
    assert curves["gud"]["modules"] == ["gate", "up", "down"]
    assert curves["qkvgud"]["jaccard"][2] == 1.0
    assert theta_curves(scores1, scores1, [0.5])["qkvgud"]["jaccard"] == [1.0]
    assert "gud" not in theta_curves(attention, attention, [0.5])


def test_fused_projections_count_as_what_they_fuse() -> None:
    fused = {f"model.layers.0.{name}_proj.lora_B.weight": torch.rand(6, 2) for name in ("qkv", "gate_up", "down")}
    curves = theta_curves(fused, fused, [0.9])
    assert {name: curves[name]["modules"] for name in ("qkvgud", "qkv", "gud")} == {
        "qkvgud": ["qkv", "gate_up", "down"],
        "qkv": ["qkv"],
        "gud": ["gate_up", "down"],
    }


def test_average_ranks_share_ties() -> None:
    assert average_ranks(torch.tensor([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1.0, 3.5, 2.0]


def halves(noise: float) -> list[Scores]:
    systems = [skewed(20), skewed(20), skewed(21), skewed(21)]
    draws = [skewed(30 + number) for number in range(4)]
    return [{k: s[k] + noise * d[k] for k in s} for s, d in zip(systems, draws, strict=True)]


def test_control_sees_systems_that_differ() -> None:
    control = half_control(*halves(noise=0.1), theta=0.5)
    assert control["warning"] is None
    for measure in ("jaccard", "spearman"):
        assert control[measure]["across"] < min(control[measure]["system1"], control[measure]["system2"])
    assert control["spearman"]["across"] == pytest.approx(0, abs=0.1)


def test_control_warns_where_there_is_only_noise() -> None:
    one = skewed(40)
    control = half_control(one, one, one, one, theta=0.9)
    assert "differ no more than random halves" in control["warning"]
    assert control["jaccard"] == {"system1": 1.0, "system2": 1.0, "across": 1.0}
    assert control["spearman"]["across"] == pytest.approx(1.0)


def test_control_ranks_a_sample_of_a_large_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = half_control(*halves(noise=1.0), theta=0.9)
    monkeypatch.setattr("lorapar_ray.partition.control.RANKED_AT_MOST", 1000)
    sampled = half_control(*halves(noise=1.0), theta=0.9)
    assert sampled == half_control(*halves(noise=1.0), theta=0.9)
    assert sampled["spearman"] != exact["spearman"]
    assert sampled["spearman"]["system1"] == pytest.approx(exact["spearman"]["system1"], abs=0.1)


def sum_units(units: Sequence[Path]) -> GradSums:
    """The sums of several units together, added in their order."""
    total = GradSums.load(units[0])
    for unit in units[1:]:
        total.add(GradSums.load(unit))
    return total


def test_the_control_grows_with_the_units_and_ends_with_all_of_them(tmp_path: Path) -> None:
    def unit(name: str, seed: int) -> Path:
        sums = GradSums(4, skewed(seed), skewed(seed))
        sums.save(tmp_path / f"{name}.safetensors")
        return tmp_path / f"{name}.safetensors"

    units1 = [unit(f"1-{number}", number) for number in range(5)]
    units2 = [unit(f"2-{number}", 50 + number) for number in range(3)]

    def points() -> Iterator[Halves]:
        return half_scores(units1, units2, lambda sums, _: sums.first)

    curve = control_curve(points(), theta=0.5)
    assert [point["examples"] for point in curve] == [[8, 8], [16, 12], [20, 12]]
    whole = [sum_units(part).first for part in (units1[::2], units1[1::2], units2[::2], units2[1::2])]
    ours, expected = curve[-1]["jaccard"], half_control(*whole, theta=0.5)["jaccard"]
    assert ours == pytest.approx(expected, abs=0.01)
    assert list(half_scores(units1[:1], units2, lambda sums, _: sums.first)) == []
    save_halves(tmp_path / "halves", points())
    for unit_file in (*units1, *units2):
        unit_file.unlink()
    assert control_curve(load_halves(tmp_path / "halves"), theta=0.5) == curve


def test_scatter_draws_real_elements_of_each_region() -> None:
    k1, k2, scores1, scores2 = two_systems()
    scores1[min(scores1)][0, 0] = 0.0
    regions = assign_regions(k1, k2, scores1, scores2, alpha=1.0, beta=1.0)
    points = scatter_sample(scores1, scores2, regions, n=400, seed=1)
    assert points == scatter_sample(scores1, scores2, regions, n=400, seed=1)
    assert {name: points["region"].count(name) for name in set(points["region"])} == dict.fromkeys(
        ("none", "system1_only", "system2_only", "shared"), 100
    )
    codes = {"none": 0, "system1_only": 1, "system2_only": 2, "shared": 3}
    known = set(
        zip(
            flat(scores1).double().clamp(min=2.0**-149).log10().tolist(),
            flat(scores2).double().log10().tolist(),
            (flat(regions) & 3).tolist(),
            strict=True,
        )
    )
    rounded = {(round(x, 9), round(y, 9), code) for x, y, code in known}
    drawn = zip(points["system1"], points["system2"], points["region"], strict=True)
    assert all((round(x, 9), round(y, 9), codes[region]) in rounded for x, y, region in drawn)


def test_scatter_takes_all_of_a_small_region() -> None:
    everything, level = {"a": torch.ones(5, dtype=torch.bool)}, {"a": torch.arange(1.0, 6.0)}
    regions = assign_regions(everything, everything, level, level, alpha=1.0, beta=1.0)
    points = scatter_sample(level, level, regions)
    assert points["region"] == ["shared"] * 5
    assert points["system1"] == pytest.approx([math.log10(value) for value in range(1, 6)])
