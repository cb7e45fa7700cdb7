"""The one-launch step, compared with torch's AdamW: on a GPU directly, elsewhere in Triton's interpreter."""

from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from lorapar_ray.optim import MaskedAdamW
from lorapar_ray.optim.triton_step import BLOCK, blocks_of
from tests.unit.interpreted import DEVICE, INTERPRETED, kernels, run_interpreted

OF_RATE = 1e-4
"""Allowed difference of a value after a step from the same state, as a share of the learning rate, besides one unit in
the last place: torch's CUDA kernel rounds β and the corrections to float32 (emulated: 2.4e-5 of the rate)."""
SHAPES = [(16, 100), (7, 13), (40, 64), (1, 1), (16, 16)]
SHARES = [0.4, 1.0, 0.1, 1.0, 0.0]


@pytest.mark.slow
def test_interpreted() -> None:
    run_interpreted(__file__)


def problem(dtype: torch.dtype = torch.float32) -> tuple[list[torch.nn.Parameter], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator).to(dtype).to(DEVICE) for shape in SHAPES]
    masks = [torch.rand(v.shape, generator=generator) < share for v, share in zip(values, SHARES, strict=True)]
    return [torch.nn.Parameter(value) for value in values], [mask.to(DEVICE) for mask in masks]


def gradients(step: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=generator).to(dtype).to(DEVICE) for shape in SHAPES]


def groups(parameters: list[Any], masks: list[Any] | None) -> list[dict[str, Any]]:
    """Two groups with different rates and decays."""
    cut = [slice(0, 2), slice(2, None)]
    masked = [{} if masks is None else {"masks": masks[part]} for part in cut]
    settings = [{"lr": 0.01, "weight_decay": 0.1}, {"lr": 0.03, "weight_decay": 0.0}]
    return [{"params": parameters[part], **settings[i], **masked[i]} for i, part in enumerate(cut)]


def launched(optimizer: MaskedAdamW) -> Any:
    assert optimizer._triton is not None, "another way was taken"
    return optimizer._triton


def units_apart(ours: torch.Tensor, theirs: torch.Tensor) -> int:
    """The largest distance in floats that lie between."""
    if not ours.numel():
        return 0
    bits = [tensor.view(torch.int32).long() for tensor in (ours, theirs)]
    ordered = [torch.where(each < 0, -(each & 0x7FFFFFFF), each) for each in bits]
    return int((ordered[0] - ordered[1]).abs().max())


def in_double_precision(value: Any, gradient: Any, first: Any, second: Any, group: dict[str, Any], number: int) -> Any:
    """The kernel's arithmetic: settings and products as doubles, values and moments as floats."""
    (beta1, beta2), wide = group["betas"], torch.float64
    correction1 = torch.tensor(1 - beta1**number, dtype=torch.float32)
    correction2 = torch.tensor((1 - beta2**number) ** 0.5, dtype=torch.float32)
    if group["weight_decay"] != 0:
        value = (value.to(wide) - group["lr"] * group["weight_decay"] * value.to(wide)).float()
    first = (beta1 * first.to(wide) + (1 - beta1) * gradient.to(wide)).float()
    second = (beta2 * second.to(wide) + (1 - beta2) * gradient.to(wide) * gradient.to(wide)).float()
    step_size = (group["lr"] / correction1.to(wide)).float()
    root = second.to(wide).sqrt().float()  # a CPU's float32 square root is not always the nearest
    divisor = ((root / correction2).to(wide) + group["eps"]).float()
    return value - step_size * first / divisor, first, second


def as_torchs_cuda_kernel(
    value: Any, gradient: Any, first: Any, second: Any, group: dict[str, Any], number: int
) -> Any:
    """`adam_math` of torch 2.13 (ATen/native/cuda/fused_adam_utils.cuh), line by line: all in float32."""

    def single(number: float) -> Any:
        return torch.tensor(number, dtype=torch.float32, device=value.device)

    def fma(a: Any, b: Any, c: Any) -> Any:
        return (a.double() * b.double() + c.double()).float()

    rate, decay, eps = single(group["lr"]), single(group["weight_decay"]), single(group["eps"])
    beta1, beta2 = map(single, group["betas"])
    correction1 = 1 - (beta1.double() ** number).float()
    correction2 = (1 - (beta2.double() ** number).float()).sqrt()
    value = value - rate * decay * value
    first = fma(beta1, first, fma(-beta1, gradient, gradient))
    square = gradient * gradient
    second = fma(beta2, second, fma(-beta2, square, square))
    return value - rate / correction1 * first / (second.sqrt() / correction2 + eps), first, second


def moments_of(masked: MaskedAdamW, number: int, masks: list[torch.Tensor]) -> list[torch.Tensor]:
    """A parameter's two moments; zeros before its first step."""
    state = masked.state[[each for group in masked.param_groups for each in group["params"]][number]]
    return [state.get(name, torch.zeros(int(masks[number].sum()), device=DEVICE)) for name in ("exp_avg", "exp_avg_sq")]


def allowed(before: torch.Tensor, after: torch.Tensor, rate: float) -> torch.Tensor:
    """How far a value may be from `after`."""
    larger = torch.maximum(before.abs(), after.abs())
    return OF_RATE * rate + (torch.nextafter(larger, torch.full_like(larger, torch.inf)) - larger)


@kernels
def test_the_arithmetic_is_in_double_precision() -> None:
    ours, masks = problem()
    masked = MaskedAdamW(groups(ours, masks))
    places = [(group, parameter) for group in masked.param_groups for parameter in group["params"]]
    zeros = [torch.zeros(int(mask.sum()), device=DEVICE) for mask in masks]
    expected = [(p.detach()[mask], zero, zero) for p, mask, zero in zip(ours, masks, zeros, strict=True)]
    for step in range(3):
        for number, ((group, parameter), gradient) in enumerate(zip(places, gradients(step), strict=True)):
            parameter.grad = gradient
            value, first, second = expected[number]
            expected[number] = in_double_precision(value, gradient[masks[number]], first, second, group, step + 1)
        masked.step()
    launched(masked)
    for (_, parameter), mask, (value, first, second) in zip(places, masks, expected, strict=True):
        assert units_apart(parameter.detach()[mask], value) <= (0 if INTERPRETED else 3)  # one per step
        assert units_apart(masked.state[parameter]["exp_avg"], first) <= (0 if INTERPRETED else 3)
        assert units_apart(masked.state[parameter]["exp_avg_sq"], second) <= (0 if INTERPRETED else 3)


@kernels
def test_a_step_is_near_that_of_torchs_cuda_kernel_in_single_precision() -> None:
    """The bound of `OF_RATE` without a GPU: each step begins with the same state."""
    ours, masks = problem()
    masked = MaskedAdamW(groups(ours, masks))
    places = [(group, parameter) for group in masked.param_groups for parameter in group["params"]]
    different = 0
    for step in range(5):
        old = [parameter.detach()[mask] for parameter, mask in zip(ours, masks, strict=True)]
        moments = [[each.clone() for each in moments_of(masked, number, masks)] for number in range(len(ours))]
        for parameter, gradient in zip(ours, gradients(step), strict=True):
            parameter.grad = gradient
        masked.step()
        for number, (group, parameter) in enumerate(places):
            mask = masks[number]
            gradient = gradients(step)[number][mask]
            value, *after = as_torchs_cuda_kernel(old[number], gradient, *moments[number], group, step + 1)
            apart = (parameter.detach()[mask] - value).abs()
            assert (apart <= allowed(old[number], value, group["lr"])).all()
            different += int((apart > 0).sum())
            with torch.no_grad():
                parameter[mask] = value
            for state, other in zip(moments_of(masked, number, masks), after, strict=True):
                state.copy_(other)
    launched(masked)
    assert different, "the emulated kernel rounds elsewhere"


@kernels
def test_active_elements_step_as_under_adamw_and_the_others_keep_their_bits() -> None:
    """Each step begins with the same state, so that one step's arithmetic is compared."""
    ours, masks = problem()
    theirs, _ = problem()
    start = [value.detach().clone() for value in ours]
    masked = MaskedAdamW(groups(ours, masks))
    stock = torch.optim.AdamW(groups(theirs, None), fused=True)
    rates = [group["lr"] for group in masked.param_groups for _ in group["params"]]
    for step in range(4):
        old = [mine.detach()[mask] for mine, mask in zip(ours, masks, strict=True)]
        for mine, other, gradient in zip(ours, theirs, gradients(step), strict=True):
            mine.grad, other.grad = gradient, gradient
        masked.step()
        stock.step()
        for mine, other, mask, before, rate in zip(ours, theirs, masks, old, rates, strict=True):
            value = other.detach()[mask]
            assert ((mine.detach()[mask] - value).abs() <= allowed(before, value, rate)).all()
            with torch.no_grad():
                mine[mask] = value
            for name in ("exp_avg", "exp_avg_sq"):
                expected = stock.state[other][name][mask]
                torch.testing.assert_close(masked.state[mine][name], expected, rtol=1e-4, atol=1e-7)
                masked.state[mine][name].copy_(expected)
    assert launched(masked).states[0]["step"] == 4
    for mine, mask, value in zip(ours, masks, start, strict=True):
        assert torch.equal(mine[~mask], value[~mask])


@kernels
def test_clipping_is_part_of_the_pass() -> None:
    ours, masks = problem()
    theirs, _ = problem()
    masked, stock = MaskedAdamW(groups(ours, masks)), torch.optim.AdamW(groups(theirs, None), foreach=False)
    for step, max_norm in enumerate((0.5, 1e6)):
        for mine, other, mask, gradient in zip(ours, theirs, masks, gradients(step), strict=True):
            mine.grad = torch.where(mask, gradient, float("nan"))  # frozen elements are not in the norm
            other.grad = gradient * mask
        before = [mine.grad.clone() for mine in ours if mine.grad is not None]
        norm = masked.clip_and_step(max_norm)
        expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
        stock.step()
        torch.testing.assert_close(norm, expected)
        for mine, other, mask, gradient in zip(ours, theirs, masks, before, strict=True):
            torch.testing.assert_close(mine[mask], other[mask], rtol=1e-5, atol=1e-6)
            assert mine.grad is not None
            torch.testing.assert_close(mine.grad, gradient, rtol=0, atol=0, equal_nan=True)
    launched(masked)


@kernels
def test_a_gradient_that_is_not_finite_shows_in_the_norm() -> None:
    ours, masks = problem()
    masked = MaskedAdamW(groups(ours, masks))
    for mine, gradient in zip(ours, gradients(0), strict=True):
        mine.grad = gradient
    ours[1].grad = torch.full_like(ours[1], float("inf"))
    before = [mine.detach().clone() for mine in ours]
    assert not masked.clip_and_step(1.0, only_finite=True).isfinite()
    assert all(torch.equal(mine, old) for mine, old in zip(ours, before, strict=True))
    assert not masked.clip_and_step(1.0).isfinite()
    launched(masked)


@kernels
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_skipped_step_changes_nothing_but_the_count_on_either_way(bad: float) -> None:
    """The device decides in the kernel, torch's kernels after a look at the norm; the steps after it are the same."""

    def run(by_kernel: bool) -> tuple[list[Any], MaskedAdamW]:
        parameters, masks = problem()
        optimizer = MaskedAdamW(groups(parameters, masks))
        optimizer._triton_was_tried = not by_kernel  # so that it uses torch's kernels
        for step in range(5):
            for parameter, gradient in zip(parameters, gradients(step), strict=True):
                parameter.grad = gradient
            if step in (0, 3):
                parameters[1].grad.fill_(bad)
            states = [optimizer.state[each] for each in parameters]
            held = [*parameters, *(state[name] for state in states for name in ("exp_avg", "exp_avg_sq"))]
            before = [each.detach().clone() for each in held]
            norm = optimizer.clip_and_step(1.0, only_finite=True)
            assert bool(norm.isfinite()) == (step not in (0, 3))
            same = [torch.equal(each, old) for each, old in zip(held, before, strict=True)]
            assert all(same) == (step in (0, 3))
            assert {state["step"] for state in states} == {step + 1}
        return parameters, optimizer

    (ours, kernel), (theirs, _) = run(True), run(False)
    launched(kernel)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


@kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision_follows_its_float32_masters(dtype: torch.dtype) -> None:
    ours, masks = problem(dtype)
    reference = [torch.nn.Parameter(value.detach().float()) for value in ours]
    start = [value.detach().clone() for value in ours]
    masked, stock = MaskedAdamW(groups(ours, masks)), torch.optim.AdamW(groups(reference, None), foreach=False)
    for step in range(4):
        for mine, other, gradient in zip(ours, reference, gradients(step, dtype), strict=True):
            mine.grad, other.grad = gradient, gradient.float()
        masked.step()
        stock.step()
    launched(masked)
    for mine, other, mask, value in zip(ours, reference, masks, start, strict=True):
        state = masked.state[mine]
        torch.testing.assert_close(state["master"], other[mask], rtol=1e-5, atol=1e-6)
        # Triton's interpreter truncates to bfloat16, a GPU rounds
        near = 2**-7 if INTERPRETED and dtype == torch.bfloat16 else 0.0
        torch.testing.assert_close(mine[mask], state["master"].to(dtype), rtol=near, atol=0.0)
        assert torch.equal(mine[~mask], value[~mask])


@kernels
def test_state_converts_to_and_from_the_other_methods() -> None:
    """A run saved without the one-launch step resumes with it, and the reverse; a schedule changes the rate."""

    def run(switch: bool) -> list[torch.Tensor]:
        parameters, masks = problem()
        optimizer = MaskedAdamW(groups(parameters, masks))
        schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
        for step in range(6):
            if switch and step in (2, 4):
                saved = optimizer.state_dict(), schedule.state_dict()
                optimizer = MaskedAdamW(groups(parameters, masks))
                schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
                optimizer.load_state_dict(saved[0])
                schedule.load_state_dict(saved[1])
                optimizer._triton_was_tried = step == 2  # so that it uses torch's kernels
            for parameter, gradient in zip(parameters, gradients(step), strict=True):
                parameter.grad = gradient
            optimizer.step()
            schedule.step()
        return parameters  # type: ignore[return-value]

    for mine, other in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


@kernels
def test_moved_values_and_gradients_are_found_again() -> None:
    ours, masks = problem()
    theirs, _ = problem()
    masked, stock = MaskedAdamW(groups(ours, masks)), torch.optim.AdamW(groups(theirs, None), foreach=False)
    for step in range(3):
        for mine, other, mask, gradient in zip(ours, theirs, masks, gradients(step), strict=True):
            mine.data = mine.data.clone()
            mine.grad, other.grad = gradient.clone(), gradient * mask
        masked.step()
        stock.step()
    launched(masked)
    for mine, other, mask in zip(ours, theirs, masks, strict=True):
        torch.testing.assert_close(mine[mask], other[mask], rtol=1e-5, atol=1e-6)


@kernels
def test_parameters_without_a_gradient_do_not_change() -> None:
    ours, masks = problem()
    start = ours[0].detach().clone()
    masked = MaskedAdamW(groups(ours, masks))
    for mine, gradient in list(zip(ours, gradients(0), strict=True))[1:]:
        mine.grad = gradient
    masked.clip_and_step(1.0)
    assert torch.equal(ours[0], start)
    assert [masked.state[mine]["step"] for mine in ours] == [0, 1, 1, 1, 1]


def test_every_active_element_lies_in_one_block() -> None:
    import numpy as np

    lengths = np.array([0, 1, BLOCK, BLOCK + 1, 0, 5 * BLOCK - 1])
    blocks = blocks_of(lengths).tolist()
    expected = [[member, start] for member, length in enumerate(lengths) for start in range(0, length, BLOCK)]
    assert blocks == expected


@pytest.mark.gpu
def test_a_step_with_clipping_is_three_launches_and_never_waits() -> None:
    ours, masks = problem()
    masked = MaskedAdamW(groups(ours, masks))
    for mine, gradient in zip(ours, gradients(0), strict=True):
        mine.grad = gradient
    masked.clip_and_step(1.0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            masked.clip_and_step(1.0, only_finite=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    on_device = [e.name for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [name for name in on_device if "mem" not in name.lower()]
    assert [name for name in kernels if name in ("squares", "factor", "adamw")] == ["squares", "factor", "adamw"]
    assert len(kernels) <= 4, kernels  # and the copy of the returned norm
