"""Scoring a batch calls fewer operators than PEFT's own forward and backward over the same tokens."""

from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from lorapar_ray.adapters import adapter_parameters, attach_lora
from lorapar_ray.importance import TokenizedExample, example_losses, gradient_sums, pack
from tests.unit.tiny_models import tiny

VIEWS = (
    "view",
    "reshape",
    "transpose",
    "expand",
    "slice",
    "select",
    "split",
    "detach",
    "t.",
    "unsqueeze",
    "as_strided",
)


class Calls(TorchDispatchMode):
    """Counts operators that compute; views launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.").lstrip("_")
        self.count += not name.startswith(VIEWS)
        return func(*args, **(kwargs or {}))


def test_scoring_launches_less_than_plain_lora(monkeypatch: pytest.MonkeyPatch) -> None:
    model = attach_lora(tiny().bfloat16(), rank=4, alpha=8, init="gaussian")
    batch = pack([TokenizedExample("", list(range(3, 3 + n)), 3) for n in (9, 7, 12)])
    with Calls() as plain:
        example_losses(model, batch).sum().backward()
    products: list[int] = []
    monkeypatch.setattr("lorapar_ray.importance.capture.add_segment_products", lambda *_: products.append(1))
    with Calls() as one:
        gradient_sums(model, [batch])
    sites, layers = len(adapter_parameters(model)) // 2, 2
    assert len(products) == sites + 3 * layers  # a kernel for each B, and one for the A's that share an input
    with Calls() as two:
        gradient_sums(model, [batch] * 2)
    a_batch = two.count - one.count + sites + 3 * layers
    assert a_batch < 0.95 * plain.count, (a_batch, plain.count)
