"""MaskedAdamW equals torch's AdamW on active elements, and changes no bit elsewhere."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.lr_scheduler import LambdaLR

from lorapar_ray.cpu.one_pass import one_pass
from lorapar_ray.optim import MaskedAdamW, learning_rate_factor, masked_param_groups, trainable_share

SHAPE = (8, 6)  # a multiple of LANES, as adapters are


@pytest.fixture(autouse=True, scope="module")
def compiled_however_small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lorapar_ray.optim.masked_adamw.WORTH_COMPILING", 0)
        yield


def parameter(seed: int, dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).to(dtype))


def mask_of(seed: int, share: float) -> torch.Tensor:
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(seed)) < share


def gradient(step: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1000 + step))


@settings(max_examples=40, deadline=None)
@given(
    share=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    lr=st.floats(1e-5, 0.3),
    decay=st.floats(0, 0.5),
    betas=st.tuples(st.floats(0, 0.99), st.floats(0.5, 0.9999)),
    steps=st.integers(1, 8),
    seed=st.integers(0, 50),
    fused=st.booleans(),
)
def test_active_elements_match_adamw_and_inactive_keep_their_bits(
    share: float, lr: float, decay: float, betas: tuple[float, float], steps: int, seed: int, fused: bool
) -> None:
    ours, theirs, mask = parameter(seed), parameter(seed), mask_of(seed + 1, share)
    start = ours.detach().clone()
    options: dict[str, Any] = {"lr": lr, "weight_decay": decay, "betas": betas}
    masked = MaskedAdamW([{"params": [ours], "masks": [mask]}], fused=fused, **options)
    stock = torch.optim.AdamW([theirs], fused=fused, foreach=False, **options)
    for step in range(steps):
        ours.grad, theirs.grad = gradient(step), gradient(step)
        masked.step()
        stock.step()
    assert torch.equal(ours[mask], theirs[mask])
    assert torch.equal(ours[~mask], start[~mask])


@pytest.mark.parametrize("compiled", [True, False])
def test_one_pass_and_torchs_kernel_give_the_same_bits(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters longer than a block, whole ones between masked ones, and more threads' ranges than parameters."""
    if compiled and one_pass() is None:
        pytest.skip("numba is not installed, or torch rounds another way on this machine")
    if not compiled:
        monkeypatch.setattr("lorapar_ray.optim.masked_adamw.one_pass", lambda: None)
    generator = torch.Generator().manual_seed(0)
    shapes, shares = [(16, 1000), (64, 48), (16, 16), (8, 900)], [0.4, 1.0, 0.0, 0.1]
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    masks = [torch.rand(shape, generator=generator) < share for shape, share in zip(shapes, shares, strict=True)]
    ours, theirs = ([torch.nn.Parameter(value.clone()) for value in start] for _ in range(2))
    masked = MaskedAdamW([{"params": ours, "masks": masks}], lr=0.01, weight_decay=0.1)
    stock = torch.optim.AdamW(theirs, lr=0.01, weight_decay=0.1, fused=True)
    for _ in range(4):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = other.grad = torch.randn(mine.shape, generator=generator)
        masked.step()
        stock.step()
    for mine, other, mask, value in zip(ours, theirs, masks, start, strict=True):
        assert torch.equal(mine[mask], other[mask])
        assert torch.equal(mine[~mask], value[~mask])


@pytest.mark.slow
def test_the_compiled_pass_leaves_torchs_threads_as_they_are() -> None:
    """numba enables nested OpenMP teams when it starts its own, which makes torch's attention eight times slower."""
    code = """
import ctypes, torch
from lorapar_ray.cpu.one_pass import one_pass
torch.set_num_threads(1)
openmp = ctypes.CDLL(None)
before = openmp.omp_get_nested(), openmp.omp_get_max_active_levels()
one_pass()
assert (openmp.omp_get_nested(), openmp.omp_get_max_active_levels()) == before
assert torch.get_num_threads() == 1
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_inactive_gradients_have_no_effect(poison: float) -> None:
    ours, mask = parameter(1), mask_of(2, 0.5)
    start = ours.detach().clone()
    ours.grad = torch.where(mask, gradient(0), torch.full(SHAPE, poison))
    optimizer = MaskedAdamW([{"params": [ours], "masks": [mask]}], lr=0.1, weight_decay=0.1)
    norm = optimizer.clip_grad_norm_(0.5)
    torch.testing.assert_close(norm, gradient(0)[mask].norm())
    optimizer.step()
    assert torch.equal(ours[~mask], start[~mask])
    assert ours.isfinite().all()


def test_clipping_scales_the_active_part_as_torch_scales_the_whole() -> None:
    ours, theirs = parameter(1), parameter(1)
    ours.grad, theirs.grad = gradient(0), gradient(0)
    optimizer = MaskedAdamW([{"params": [ours], "masks": [None]}])
    torch.testing.assert_close(optimizer.clip_grad_norm_(0.1), torch.nn.utils.clip_grad_norm_([theirs], 0.1))
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_memory_is_the_active_share() -> None:
    mask = mask_of(3, 0.4)
    optimizer = MaskedAdamW([{"params": [parameter(1)], "masks": [mask]}])
    active = int(mask.sum())
    assert optimizer.state_bytes() == {"moments": 2 * 4 * active, "index": 4 * active}
    assert trainable_share({"a": mask}) == active / mask.numel()
    assert MaskedAdamW([{"params": [parameter(1)], "masks": [None]}]).state_bytes()["index"] == 0


def test_bfloat16_parameters_follow_their_float32_masters() -> None:
    ours, mask = parameter(1, torch.bfloat16), mask_of(2, 0.5)
    reference = torch.nn.Parameter(ours.detach().float())
    start = ours.detach().clone()
    masked = MaskedAdamW([{"params": [ours], "masks": [mask]}], lr=1e-3)
    stock = torch.optim.AdamW([reference], lr=1e-3, fused=True)
    for step in range(20):
        small = gradient(step).bfloat16()
        ours.grad, reference.grad = small, small.float()
        masked.step()
        stock.step()
    assert torch.equal(ours[mask], reference[mask].bfloat16())
    assert torch.equal(ours[~mask], start[~mask])


def test_resuming_from_a_state_dict_is_exact_and_another_mask_is_refused() -> None:
    mask = mask_of(2, 0.5)

    def fresh() -> tuple[torch.nn.Parameter, MaskedAdamW, LambdaLR]:
        value = parameter(1)
        optimizer = MaskedAdamW([{"params": [value], "masks": [mask]}], lr=0.1)
        return value, optimizer, LambdaLR(optimizer, lambda step: 1 / (1 + step))

    def run(value: torch.nn.Parameter, optimizer: MaskedAdamW, schedule: LambdaLR, steps: range) -> None:
        for step in steps:
            value.grad = gradient(step)
            optimizer.step()
            schedule.step()

    whole = fresh()
    run(*whole, range(6))
    half = fresh()
    run(*half, range(3))
    resumed = fresh()
    resumed[0].data.copy_(half[0])
    resumed[1].load_state_dict(half[1].state_dict())
    resumed[2].load_state_dict(half[2].state_dict())
    run(*resumed, range(3, 6))
    assert torch.equal(resumed[0], whole[0])
    other = MaskedAdamW([{"params": [parameter(1)], "masks": [mask_of(9, 0.5)]}])
    with pytest.raises(ValueError, match="another mask"):
        other.load_state_dict(half[1].state_dict())


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_parameters_that_skip_steps_keep_their_own_count(share: float) -> None:
    ours, theirs = [parameter(1), parameter(2)], [parameter(1), parameter(2)]
    masks = [mask_of(3, share), mask_of(4, share)]
    start = ours[0].detach().clone()
    masked = MaskedAdamW([{"params": ours, "masks": masks}], weight_decay=0.5)
    stock = torch.optim.AdamW(theirs, weight_decay=0.5, fused=True)
    for step, moving in enumerate([(1,), (0, 1), (0,), (0, 1)]):
        for number in range(2):
            value = gradient(step + 10 * number) if number in moving else None
            ours[number].grad, theirs[number].grad = value, value
        masked.step()
        stock.step()
        assert step > 0 or torch.equal(ours[0], start)
    for mine, other, mask in zip(ours, theirs, masks, strict=True):
        assert torch.equal(mine[mask], other[mask])


def test_a_group_added_later_keeps_its_mask() -> None:
    first, later, mask = parameter(1), parameter(2), mask_of(3, 0.5)
    start = later.detach().clone()
    optimizer = MaskedAdamW([first], lr=0.1)
    optimizer.add_param_group({"params": [later], "masks": [mask]})
    later.grad = gradient(0)
    optimizer.step()
    assert torch.equal(later[~mask], start[~mask])
    assert not torch.equal(later[mask], start[mask])


def test_lora_plus_gives_b_its_own_rate() -> None:
    named = {"x.lora_A.weight": parameter(1), "x.lora_B.weight": parameter(2)}
    masks = {key: mask_of(1, 0.5) for key in named}
    rates = [g["lr"] for g in masked_param_groups(named, masks, lr=0.1, weight_decay=0.0, lora_plus_ratio=16.0)]
    assert rates == [0.1, 1.6]


@pytest.mark.parametrize("options", [{"lr": -1.0}, {"betas": (1.0, 0.9)}, {"eps": -1.0}, {"weight_decay": -0.1}])
def test_settings_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="need lr"):
        MaskedAdamW([{"params": [parameter(1)]}], **options)


def test_masks_must_fit() -> None:
    with pytest.raises(ValueError, match="mask of shape"):
        MaskedAdamW([{"params": [parameter(1)], "masks": [torch.ones(3, dtype=torch.bool)]}])


def test_schedules_warm_up_and_decay() -> None:
    factors = [learning_rate_factor(s, 10, warmup_ratio=0.2, kind="linear") for s in range(10)]
    assert factors[:3] == [0.0, 0.5, 1.0]
    assert factors[-1] == pytest.approx(1 / 8)
    assert learning_rate_factor(5, 10, warmup_ratio=0.0, kind="cosine") == pytest.approx(0.5)
    assert learning_rate_factor(9, 10, warmup_ratio=0.0, kind="constant") == 1.0


@settings(max_examples=40, deadline=None)
@given(
    shares=st.lists(st.sampled_from([0.0, 0.2, 0.7, 1.0]), min_size=1, max_size=5),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    max_norm=st.floats(1e-3, 10),
    scale=st.sampled_from([1.0, 2.0**10]),
    ratio=st.sampled_from([1.0, 16.0]),
    cut=st.integers(1, 5),
    seed=st.integers(0, 50),
)
def test_whole_loops_match_adamw_whatever_is_switched_on(
    shares: list[float], dtype: torch.dtype, max_norm: float, scale: float, ratio: float, cut: int, seed: int
) -> None:
    """Loss scaling, clipping, a schedule, LoRA+ rates, decay and a resume half-way, with several parameters."""
    names = [f"layer{i}.lora_{letter}.weight" for i in range(len(shares)) for letter in "AB"]
    masks = {name: mask_of(seed + i, shares[i // 2]) for i, name in enumerate(names)}
    start = {name: parameter(seed + 100 + i, dtype) for i, name in enumerate(names)}
    ours = {name: torch.nn.Parameter(value.detach().clone()) for name, value in start.items()}
    wide = torch.promote_types(dtype, torch.float32)
    theirs = {name: torch.nn.Parameter(value.detach().clone().to(wide)) for name, value in start.items()}

    def masked() -> tuple[MaskedAdamW, LambdaLR]:
        groups = masked_param_groups(ours, masks, lr=0.05, weight_decay=0.1, lora_plus_ratio=ratio)
        optimizer = MaskedAdamW(groups)
        return optimizer, LambdaLR(optimizer, lambda step: 1 / (1 + step))

    rates = {name: 0.05 * (ratio if ".lora_B." in name else 1.0) for name in names}
    groups = [{"params": [theirs[name]], "lr": rates[name], "weight_decay": 0.1} for name in names]
    stock = torch.optim.AdamW(groups, fused=True)
    stock_schedule = LambdaLR(stock, lambda step: 1 / (1 + step))
    optimizer, schedule = masked()
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale > 1)
    for step in range(6):
        if step == cut:
            saved = optimizer.state_dict(), schedule.state_dict()
            optimizer, schedule = masked()
            optimizer.load_state_dict(saved[0])
            schedule.load_state_dict(saved[1])
        for i, name in enumerate(names):
            value = torch.randn(SHAPE, generator=torch.Generator().manual_seed(7000 + 100 * step + i)).to(dtype)
            ours[name].grad = torch.where(masks[name], value * scale, torch.full_like(value, 1e30))
            theirs[name].grad = (value * masks[name]).to(wide)
        scaler.scale(torch.zeros(()))  # the scaler creates its scale at its first use
        scaler.unscale_(optimizer)
        norm = optimizer.clip_grad_norm_(max_norm)
        together = torch.cat([theirs[name].grad.flatten() for name in names]).norm()
        torch.testing.assert_close(norm.double(), together.double(), rtol=1e-5, atol=1e-9)
        for name in names:  # one definition of the scaling factor, so that only the step is compared
            theirs[name].grad = torch.where(masks[name], ours[name].grad, 0).to(wide)
        scaler.step(optimizer)
        scaler.update(scale)
        stock.step()
        schedule.step()
        stock_schedule.step()
    for name in names:
        assert torch.equal(ours[name][masks[name]], theirs[name][masks[name]].to(dtype)), name
        assert torch.equal(ours[name][~masks[name]], start[name][~masks[name]]), name


def test_an_overflow_under_loss_scaling_skips_the_step_whole() -> None:
    ours, mask = parameter(1), mask_of(2, 0.5)
    start = ours.detach().clone()
    optimizer = MaskedAdamW([{"params": [ours], "masks": [mask]}], lr=0.1, weight_decay=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))
    ours.grad = torch.full(SHAPE, float("inf"))
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(ours, start)
    assert scaler.get_scale() == 2.0


def test_an_empty_mask_leaves_its_parameter_unchanged() -> None:
    ours = parameter(1)
    start = ours.detach().clone()
    optimizer = MaskedAdamW([{"params": [ours], "masks": [torch.zeros(SHAPE, dtype=torch.bool)]}], weight_decay=0.9)
    for step in range(3):
        ours.grad = gradient(step)
        assert float(optimizer.clip_grad_norm_(1.0)) == 0.0
        optimizer.step()
    assert torch.equal(ours, start)
    assert optimizer.state_bytes() == {"moments": 0, "index": 0}


@settings(max_examples=20, deadline=None)
@given(shape=st.tuples(st.integers(1, 9), st.integers(1, 9)), seed=st.integers(0, 50))
def test_odd_lengths_differ_by_rounding_only(shape: tuple[int, int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    start, mask = torch.randn(shape, generator=generator), torch.rand(shape, generator=generator) < 0.5
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    masked = MaskedAdamW([{"params": [ours], "masks": [mask]}], lr=0.1)
    stock = torch.optim.AdamW([theirs], lr=0.1, fused=True)
    for _ in range(5):
        ours.grad = theirs.grad = torch.randn(shape, generator=generator)
        masked.step()
        stock.step()
    torch.testing.assert_close(ours[mask], theirs[mask], rtol=1e-5, atol=1e-6)
    assert torch.equal(ours[~mask], start[~mask])
