"""Attention by products in 16 bits: as close to exact attention as transformers' own, outputs and gradients."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.llama.modeling_llama import eager_attention_forward

from lorapar_ray import packed_attention
from lorapar_ray.cpu import short_attention
from lorapar_ray.packed_layout import Span, make_layout, spans_of_examples, spans_of_group

HEADS, GROUPS, SIZE = 6, 2, 32
Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def outputs_and_gradients(attend: Attend, parts: list[Tensor], mask: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """In float64: the outputs, and the gradients of queries, keys and values of a weighted sum of them."""
    own = [part.to(dtype, copy=True).requires_grad_() for part in parts]
    found = attend(*own, mask.to(dtype))
    torch.manual_seed(1)
    found.backward(torch.randn(found.shape, dtype=torch.float64).to(dtype))
    return [found.detach().double(), *(part.grad.double() for part in own if part.grad is not None)]


@pytest.mark.parametrize(("Q", "K"), [(40, 40), (24, 70)])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_products_are_as_exact_as_transformers_eager_attention(Q: int, K: int, scaling: float | None) -> None:
    torch.manual_seed(0)
    sizes = ((HEADS, Q), (GROUPS, K), (GROUPS, K))
    parts = [torch.randn(3, heads, count, SIZE).bfloat16() for heads, count in sizes]
    later = torch.ones(Q, K, dtype=torch.bool).triu(1 + K - Q)
    mask = torch.zeros(3, 1, Q, K).masked_fill(later, torch.finfo(torch.bfloat16).min)

    module = torch.nn.Module()
    module.num_key_value_groups = HEADS // GROUPS

    def eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        found, _ = eager_attention_forward(module, q, k, v, mask, SIZE**-0.5 if scaling is None else scaling)
        return found.transpose(1, 2)

    def fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        keys, values = (each.repeat_interleave(HEADS // GROUPS, 1) for each in (k, v))
        return scaled_dot_product_attention(q, keys, values, mask, scale=scaling)

    def products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return short_attention.attend(q, k, v, mask, scaling)

    exact = outputs_and_gradients(fused, parts, mask, torch.float64)
    for true, usual, ours in zip(
        exact,
        outputs_and_gradients(eager, parts, mask, torch.bfloat16),
        outputs_and_gradients(products, parts, mask, torch.bfloat16),
        strict=True,
    ):
        assert (ours - true).norm() <= 1.1 * (usual - true).norm() <= 0.02 * true.norm()
    for true, ours in zip(exact, outputs_and_gradients(products, parts, mask, torch.float64), strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(
    "spans",
    [spans_of_examples([9, 19, 12]), spans_of_group(range(20), [range(20, 26), range(26, 29), range(29, 40)])],
    ids=["examples", "completions of one prompt"],
)
def test_packed_rows_take_it_and_agree(spans: list[Span], window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padded queries and keys are not read."""
    torch.manual_seed(0)
    layout = make_layout(spans, 40, torch.device("cpu"))
    q, k, v = (torch.randn(1, heads, 40, SIZE).bfloat16() for heads in (HEADS, GROUPS, GROUPS))

    def packed() -> Tensor:
        plain = torch.nn.Module()
        return packed_attention.packed_attention(plain, q, k, v, None, packed_layout=layout, sliding_window=window)[
            0
        ].float()

    monkeypatch.setattr(short_attention, "MOST_KEYS", 0)
    fused = packed()
    monkeypatch.undo()
    monkeypatch.delattr(packed_attention, "scaled_dot_product_attention")
    assert (packed() - fused).norm() <= 0.01 * fused.norm()
