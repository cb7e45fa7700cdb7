"""The kernel of per-example sums, compared with the plain way: on a GPU directly, elsewhere in Triton's interpreter."""

import pytest
import torch

from lorapar_ray.importance.batching import Layout, layout_of
from lorapar_ray.importance.segments import _batched
from lorapar_ray.optim.triton_step import has_triton
from tests.unit.interpreted import DEVICE, INTERPRETED, kernels, run_interpreted

LENGTHS = {"uneven": [3, 40, 2, 17, 64], "even": [16, 16, 16], "one": [33]}


@pytest.mark.slow
def test_interpreted() -> None:
    run_interpreted(__file__)


def layout(lengths: list[int]) -> Layout:
    return layout_of(
        {"labels": torch.ones(1, sum(lengths), dtype=torch.long), "lengths": torch.tensor(lengths)}, DEVICE
    )


@kernels
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize(("rows", "columns"), [(8, 40), (16, 100), (5, 33), (64, 40), (192, 40), (200, 33)])
@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.float16,
        pytest.param(torch.bfloat16, marks=pytest.mark.gpu),
    ],  # the interpreter has no bfloat16
)
def test_sums_are_those_of_the_products_one_by_one(
    lengths: list[int], rows: int, columns: int, dtype: torch.dtype
) -> None:
    from lorapar_ray.importance.segment_kernel import launch

    own, generator = layout(lengths), torch.Generator().manual_seed(0)
    small, wide = (torch.randn(sum(lengths), size, generator=generator) for size in (rows, columns))
    small, wide = small.to(dtype).to(DEVICE), wide.to(dtype).to(DEVICE)
    ours, theirs = ([torch.ones(rows, columns, device=DEVICE) for _ in range(2)] for _ in range(2))
    launch(small, wide, own.offsets, *ours, 0.5)
    _batched(small, wide, own, *theirs, 0.5)
    for mine, other in zip(ours, theirs, strict=True):  # products of 16-bit numbers are exact in float32
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-4)


SHARED_MEMORY = {75: 64 * 1024, 80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
"""Bytes that a block can have, by compute capability (CUDA C++ programming guide, technical specifications)."""


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED or not has_triton(), reason="needs Triton's compiler; it needs no GPU")
@pytest.mark.parametrize(("rows", "columns", "element_size"), [(3 * 256, 11008, 2), (3 * 128, 4096, 4)])
def test_a_group_of_any_rank_fits_the_shared_memory_of_a_multiprocessor(
    rows: int, columns: int, element_size: int
) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lorapar_ray.importance.segment_kernel import configuration, segment_sums

    (wide, high), constants = configuration(rows, columns, element_size)
    assert high * constants["block_rows"] >= rows and wide * constants["block_columns"] >= columns
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    numbers = {"examples", "columns", "wide_stride", "out_row", "out_column"}
    inputs = {"small": "*bf16", "wide": "*bf16"} if element_size == 2 else {"small": "*fp32", "wide": "*fp32"}
    types = inputs | {"offsets": "*i64", "first": "*fp32", "second": "*fp32", "scale": "fp32"}
    types |= dict.fromkeys(numbers, "i32") | dict.fromkeys(constants, "constexpr")
    source = ASTSource(segment_sums, {name: types[name] for name in segment_sums.arg_names}, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 89, 32), options=options)
    assert 0 < compiled.metadata.shared <= min(SHARED_MEMORY.values())


@kernels
def test_sums_of_a_transposed_view_and_of_columns_of_a_wider_matrix() -> None:
    from lorapar_ray.importance.segment_kernel import launch

    own, generator = layout(LENGTHS["uneven"]), torch.Generator().manual_seed(1)
    tokens = sum(LENGTHS["uneven"])
    small, both = torch.randn(tokens, 8, generator=generator), torch.randn(tokens, 96, generator=generator)
    small, wide = small.to(DEVICE), both.to(DEVICE)[:, 10:50]
    ours, theirs = ([torch.zeros(40, 8, device=DEVICE) for _ in range(2)] for _ in range(2))
    launch(small, wide, own.offsets, *(each.T for each in ours), 1.0)
    _batched(small, wide, own, *(each.T for each in theirs), 1.0)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-4)
    launch(small, wide, own.offsets, *(each.T for each in ours), 1.0)
    torch.testing.assert_close(ours[0], 2 * theirs[0], rtol=1e-5, atol=1e-4)  # it adds
