"""Fault injection: a GPU whose memory is too small for CUDA graphs beside a pass.

There is no GPU here. `SmallGpu` replaces the few calls of `torch.cuda` that `GraphPasses` makes, and counts memory as
the caching allocator does: what a pass holds lives as long as its frame, so also in the traceback of an exception; a
graph's pool lives as long as its graphs; both are free only after `empty_cache`. Gradients and losses are real.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorapar_ray.sft import passes
from lorapar_ray.sft.passes import EagerPasses, GraphPasses
from lorapar_ray.sft.rows import Rows

CPU = torch.device("cpu")
ROOM = 100


class Block:
    """Memory of a pass."""


class SmallGpu:
    """`ROOM` bytes; a pass needs as many as its rows have tokens."""

    def __init__(self) -> None:
        self.live: weakref.WeakKeyDictionary[Block, int] = weakref.WeakKeyDictionary()
        self.graphs: weakref.WeakSet[Graph] = weakref.WeakSet()
        self.pool = 0
        self.capturing: Graph | None = None
        self.quiet = False
        self.broken = False

    def allocate(self, size: int) -> Block | None:
        if self.quiet:  # a replay
            return None
        if self.capturing is not None:
            if self.broken:
                raise RuntimeError("operation not permitted when stream is capturing")
            self.capturing.held += size
            self.pool = max(self.pool, self.capturing.held)
            return None
        if self.pool + sum(self.live.values()) + size > ROOM:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        block = Block()
        self.live[block] = size
        return block

    def empty_cache(self) -> None:
        if not self.graphs:
            self.pool = 0

    def losses(self, model: nn.Parameter, rows: Rows) -> Tensor:
        """The loss of a model that is one parameter; the second half of the memory may be missing."""
        if self.capturing is not None:
            self.capturing.rows = rows
        half = rows.input_ids.numel() // 2
        first = self.allocate(half)
        losses = (model * rows.input_ids.sum())[None]
        second = self.allocate(half)
        del first, second
        return losses

    @contextmanager
    def graph(self, graph: Graph, **_: Any) -> Iterator[None]:
        self.empty_cache()
        self.graphs.add(graph)
        self.capturing = graph
        try:
            yield
        finally:
            self.capturing = None


class Graph:
    """A graph computes its rows again, in memory that its pool holds."""

    gpu: SmallGpu
    rows: Rows
    held = 0
    run: Callable[[Rows], None]

    def replay(self) -> None:
        self.gpu.quiet = True
        self.run(self.rows)
        self.gpu.quiet = False


class Stream:
    def __init__(self, *_: Any) -> None:
        pass

    def wait_stream(self, _: Any) -> None:
        pass


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SmallGpu:
    """Fault injection, see above."""
    gpu = SmallGpu()
    monkeypatch.setattr(Graph, "gpu", gpu, raising=False)
    for name, value in {
        "Stream": Stream,
        "current_stream": Stream,
        "stream": nullcontext,
        "graph_pool_handle": tuple,
        "CUDAGraph": Graph,
        "graph": gpu.graph,
        "synchronize": lambda *_: None,
        "empty_cache": gpu.empty_cache,
        "get_rng_state": lambda _: torch.get_rng_state(),
        "set_rng_state": lambda state, _: torch.set_rng_state(state),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(passes, "arm_losses", gpu.losses)
    monkeypatch.setattr(passes, "on_device", lambda tensor, _: tensor)
    return gpu


def rows(length: int) -> Rows:
    one = torch.ones(1, dtype=torch.int64)
    return Rows(torch.arange(length)[None], None, one - 1, one, one)


def graphs_of(model: nn.Parameter, monkeypatch: pytest.MonkeyPatch) -> GraphPasses:
    made = GraphPasses(model, [model], CPU)
    monkeypatch.setattr(Graph, "run", lambda self, rows: GraphPasses._pass(made, rows), raising=False)
    return made


def step(passes: Any, model: nn.Parameter, lengths: list[int]) -> tuple[float, float]:
    """(loss, gradient) of a step with rows of these lengths."""
    passes.begin(len(lengths))
    for length in lengths:
        passes.add(rows(length))
    assert model.grad is not None
    return float(passes.loss()), float(model.grad)


def eagerly(lengths: list[int]) -> tuple[float, float]:
    model = nn.Parameter(torch.tensor(2.0))
    return step(EagerPasses(model, [model], CPU), model, lengths)


@pytest.mark.parametrize(("most", "lengths"), [(32, [60, 64, 60, 90]), (1, [60, 20, 64, 60, 90]), (32, [60, 90, 60])])
def test_graphs_are_dropped_where_they_leave_too_little_memory(
    most: int, lengths: list[int], gpu: SmallGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second shape does not fit beside the first one's pool: neither its warm-up nor, with no graph left, its only
    pass; alone it fits."""
    monkeypatch.setattr(passes, "GRAPHS", most)
    expected = eagerly(lengths)
    model = nn.Parameter(torch.tensor(2.0))
    ours = graphs_of(model, monkeypatch)
    with pytest.warns(UserWarning, match=r"memory is too small for CUDA graphs.*sft\.acceleration: none") as told:
        assert step(ours, model, lengths) == pytest.approx(expected)
    assert len(told) == 1
    assert not ours.capturing and ours.captured == 0 and gpu.pool == 0
    assert step(ours, model, lengths) == pytest.approx(expected)


def test_shapes_that_fit_keep_their_graphs(gpu: SmallGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [20, 40, 20, 30, 40]
    model = nn.Parameter(torch.tensor(2.0))
    ours = graphs_of(model, monkeypatch)
    assert step(ours, model, lengths) == pytest.approx(eagerly(lengths))
    assert ours.capturing and ours.captured == 3 and gpu.pool == 40


def test_a_model_that_cannot_be_captured_is_named_as_the_reason(gpu: SmallGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.broken = True
    model = nn.Parameter(torch.tensor(2.0))
    ours = graphs_of(model, monkeypatch)
    with pytest.warns(UserWarning, match="no CUDA graph for this model"):
        assert step(ours, model, [20, 40]) == pytest.approx(eagerly([20, 40]))
    assert not ours.capturing


def test_rows_that_fit_no_empty_gpu_still_fail(gpu: SmallGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Parameter(torch.tensor(2.0))
    ours = graphs_of(model, monkeypatch)
    with (
        pytest.warns(UserWarning, match="memory is too small"),
        pytest.raises(torch.cuda.OutOfMemoryError),
    ):
        step(ours, model, [60, 220])
