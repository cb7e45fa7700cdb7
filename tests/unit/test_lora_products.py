"""On a CPU each token gets its own adapter's LoRA product, in one step with other adapters' tokens and with none."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lorapar_ray.cpu.engine import lighten

RANK, INPUTS, SLICES, SLOTS = 8, 48, (32, 16), 3


def wrapper(adapter_of_token: list[int], *, ours: bool = True) -> Any:
    """vLLM's own wrapper, for a step whose tokens use these adapters (0: none)."""
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    made = PunicaWrapperCPU(64, 16, "cpu")
    if ours:
        lighten(SimpleNamespace(model=SimpleNamespace(lora_manager=SimpleNamespace(punica_wrapper_mapping={"": made}))))
    mapping = LoRAMapping(tuple(adapter_of_token), tuple(adapter_of_token), is_prefill=True)
    made.update_metadata(mapping, [7, None, 9], SLOTS + 1, 100)
    return made


@pytest.fixture
def matrices() -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    draw = torch.Generator().manual_seed(0)
    return (
        tuple(torch.randn(SLOTS, 1, RANK, INPUTS, generator=draw) for _ in SLICES),
        tuple(torch.randn(SLOTS, 1, size, RANK, generator=draw) for size in SLICES),
    )


def inputs(tokens: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(tokens, sum(SLICES), generator=draw), torch.randn(tokens, INPUTS, generator=draw)


def expected(y: Tensor, x: Tensor, slots: list[int | None], a: Any, b: Any, scale: float) -> Tensor:
    rows = []
    for token, slot in enumerate(slots):
        parts = [
            torch.zeros(size) if slot is None else b[i][slot, 0] @ a[i][slot, 0] @ x[token]
            for i, size in enumerate(SLICES)
        ]
        rows.append(y[token] + scale * torch.cat(parts))
    return torch.stack(rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("adapters", "slots"),
    [
        ([7, 7, 7], [0, 0, 0]),
        ([9, 7, 9, 7], [2, 0, 2, 0]),
        ([9, 0, 7, 0], [2, None, 0, None]),
        ([0, 9, 9], [None, 2, 2]),
        ([0, 0], [None, None]),
    ],
)
def test_each_token_gets_its_own_adapter(matrices: Any, adapters: list[int], slots: list[int | None]) -> None:
    a, b = matrices
    y, x = inputs(len(adapters))
    wanted = expected(y, x, slots, a, b, 0.5)
    added = torch.full_like(y, 9.0)
    wrapper(adapters).add_lora_linear(added, x, a, b, 0.5, SLICES, add_inputs=False)
    torch.testing.assert_close(added, wanted - y, rtol=1e-4, atol=1e-4)
    wrapper(adapters).add_lora_linear(y, x, a, b, 0.5, SLICES)
    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_it_agrees_with_vllm_where_every_token_has_an_adapter(matrices: Any) -> None:
    a, b = (tuple(each.bfloat16() for each in matrix) for matrix in matrices)
    y, x = (each.bfloat16() for each in inputs(6))
    theirs = y.clone()
    wrapper([7, 9, 9, 7, 7, 9], ours=False).add_lora_linear(theirs, x, a, b, 1.0, SLICES)
    wrapper([7, 9, 9, 7, 7, 9]).add_lora_linear(y, x, a, b, 1.0, SLICES)
    torch.testing.assert_close(y, theirs, rtol=0.02, atol=0.3)  # sums of 8 terms of about 7, rounded to bfloat16


@pytest.mark.slow
def test_an_overflow_of_one_adapter_stays_with_its_tokens(matrices: Any) -> None:
    a, b = matrices
    a[0][2] = torch.inf
    y, x = inputs(4)
    wrapper([9, 7, 0, 7]).add_lora_linear(y, x, a, b, 1.0, SLICES)
    assert y.isfinite().all(dim=1).tolist() == [False, True, True, True]


@pytest.mark.slow
def test_a_loaded_adapter_replaces_the_one_in_its_slot(matrices: Any) -> None:
    """As vLLM does it: in place, in inference mode."""
    a, b = matrices
    with torch.inference_mode():
        made, (y, x) = wrapper([7, 9]), inputs(2)
        made.add_lora_linear(y.clone(), x, a, b, 1.0, SLICES)
        b[0][0].copy_(torch.ones_like(b[0][0]))
        wanted = expected(y, x, [0, 2], a, b, 1.0)
        made.add_lora_linear(y, x, a, b, 1.0, SLICES)
        torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-4)
