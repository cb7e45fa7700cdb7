"""What the comparison of served weights accepts and detects; engines are tested in tests/e2e/test_grpo_policy.py."""

import pytest
import torch

from lorapar_ray.adapters import merged_weights
from lorapar_ray.engines import rounding
from lorapar_ray.engines.rounding import beyond, merged_exactly, scaled_exactly, worst
from lorapar_ray.engines.served_weights import COLUMNS, complaint, drawn

NAME = "model.layers.0.self_attn.q_proj"
KEYS = [f"base_model.model.{NAME}.lora_{part}.weight" for part in "AB"]


def policy(
    seed: int, rank: int, size: float, file_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = 0.05 * torch.randn(96, 80, generator=generator)
    down, up = (size * torch.randn(shape, generator=generator) for shape in ((rank, 80), (96, rank)))
    return base.to(file_dtype), down, up


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e-3, 0.1, 3.0])
@pytest.mark.parametrize("rank", [1, 8, 64])
def test_a_correct_merge_lies_within_the_bound(rank: int, size: float, dtype: torch.dtype) -> None:
    for seed in range(5):
        base, down, up = policy(seed, rank, size, torch.bfloat16 if seed % 2 else torch.float32)
        state = dict(zip(KEYS, (down, up), strict=True))
        [(_, merged)] = merged_weights({f"{NAME}.weight": base}, state, scaling=1.7, dtype=dtype)
        assert beyond(merged, *merged_exactly(base, down, up, 1.7, dtype)) <= 1
        assert beyond((1.7 * up.to(dtype)), *scaled_exactly(up, 1.7, dtype)) <= 1


def test_a_step_of_1e_7_lies_beyond_it() -> None:
    base, down, up = policy(0, 8, 0.02, torch.bfloat16)
    before = merged_weights(
        {f"{NAME}.weight": base}, dict(zip(KEYS, (down, up - 1e-7), strict=True)), scaling=2.0, dtype=torch.float32
    )
    [(_, stale)] = before
    exact, bound = merged_exactly(base, down, up, 2.0, torch.float32)
    assert beyond(stale, exact, bound) > 10
    few = drawn("digest", 80)  # as many columns as an engine compares
    assert beyond(stale[:, few], exact[:, few], bound[:, few]) > 10
    assert beyond(stale.where(stale < stale.max(), torch.nan), exact, bound) > 1e30


def test_a_module_without_an_adapter_must_be_the_bases_bit_for_bit_in_float32() -> None:
    base, _, _ = policy(0, 1, 1.0, torch.bfloat16)
    nothing = base.new_zeros(0, 80), base.new_zeros(96, 0)
    exact, bound = merged_exactly(base, *nothing, 2.0, torch.float32)
    assert beyond(base.float(), exact, bound) == 0
    assert beyond(base.float() * (1 + 2**-22), exact, bound) > 1


@pytest.mark.parametrize("together", [False, True])
def test_all_modules_are_compared_and_the_device_is_read_once(together: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU would be waited for at each number that is read; so many small matrices go in a few launches."""
    monkeypatch.setattr(rounding, "AT_ONCE", 5 * 96 * 80)
    items: list[rounding.Item] = []
    for number in range(12):
        base, down, up = policy(number, 4 + 4 * (number % 2), 0.1, torch.bfloat16)
        merged = base.float() + 1.7 * up @ down
        items.append(("", (merged * (1 + 1e-3 * (number in (3, 8))), base, down, up)))
    base = items[0][1][1]
    items.append(("", (base.float(), base, base.new_zeros(0, 80), base.new_zeros(96, 0))))
    items.append(("", (base.new_zeros(0, 80).float(), base[:0], items[0][1][2], items[0][1][3][:0])))
    launches = []

    def off(kind: str, held: torch.Tensor, *parts: torch.Tensor) -> torch.Tensor:
        launches.append(len(held))
        return beyond(held, *merged_exactly(*parts, 1.7, torch.float32))

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        found = worst(items, off, together=together)
    reads = sum(each.count for each in profiler.key_averages() if each.key == "aten::_local_scalar_dense")
    assert reads <= 1
    assert launches == ([5, 1, 5, 1, 1, 1] if together else [1] * 14)
    assert [number for number, times in enumerate(found) if times > 1] == [3, 8]
    alone = [float(beyond(held, *merged_exactly(*parts, 1.7, torch.float32))) for _, (held, *parts) in items]
    assert found == pytest.approx(alone, rel=1e-6)


def test_columns_differ_from_policy_to_policy() -> None:
    columns = [tuple(drawn(f"digest {policy} {NAME}", 4096).tolist()) for policy in range(100)]
    assert len(set(columns)) == 100
    assert max(map(len, columns)) == COLUMNS
    assert columns[0] == tuple(drawn(f"digest 0 {NAME}", 4096).tolist())


def test_the_complaint_names_the_worst_module() -> None:
    assert complaint({}, 7) == ""
    line = complaint({"a": 3.0, "b": 2e9}, 7)
    assert line.startswith("2 of 7 modules compute with other weights, most of all 'b' (2e+09 times")
