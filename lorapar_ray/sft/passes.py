"""Forward and backward passes of a step: operation by operation, or as CUDA graphs.

On a GPU a small model's step time is mostly thousands of kernel launches. A CUDA graph launches them all at once, so
each shape of micro-batch (few, since lengths come in buckets) is captured when it first occurs and then replayed. The
buffers of a graph keep their addresses: rows, gradients, loss. Graphs share a memory pool of their own, which holds the
activations of the largest; a shape's first passes need theirs in addition. If that is too much, the graphs are dropped.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lorapar_ray.sft.loss import arm_losses
from lorapar_ray.sft.rows import Rows, Shape, rows_in
from lorapar_ray.transfer import on_device

GRAPHS = 32
"""Most shapes with a graph; later shapes run without."""
LARGE = 1e9
"""Parameters of a model whose passes take longer than their launches."""
WARM_UP = 2
"""Passes before a capture: libraries choose algorithms and allocate workspaces in the first."""


class Passes(Protocol):
    """The interface for a training loop."""

    def begin(self, *tokens: int) -> None:
        """Start a step in which each adapter's loss is divided by so many tokens: no gradient, no loss yet."""

    def add(self, rows: Rows) -> None:
        """Add a micro-batch's gradients and loss; `rows` may still lie in host memory."""

    def loss(self) -> Tensor:
        """The step's loss so far of each adapter: [arms], on the device."""

    @property
    def buckets(self) -> int:
        """How rows are to be filled up, see `rows.collate`."""


class EagerPasses:
    """Every operation launched by itself."""

    def __init__(
        self, model: Any, parameters: Sequence[nn.Parameter], device: torch.device, arms: int | None = None
    ) -> None:
        """Take what trains.

        Args:
            arms: adapters that train together: the gradients are then kept from step to step, since each adapter's are
                views of them. None: one adapter.
        """
        self._model, self._parameters, self._device = model, list(parameters), device
        self._arms = arms or 1
        self._kept = None if arms is None else flat_gradients(self._parameters, device)
        self._scale = self._loss = torch.zeros(self._arms, device=device)

    @property
    def buckets(self) -> int:
        return 0  # a shape costs nothing

    def begin(self, *tokens: int) -> None:
        self._scale = _inverse(tokens, self._arms, self._device)
        self._loss = torch.zeros(self._arms, device=self._device)
        if self._kept is not None:
            self._kept.zero_()
            return
        for parameter in self._parameters:
            parameter.grad = None

    def add(self, rows: Rows) -> None:
        rows = rows.to(self._device)
        losses = arm_losses(self._model, rows) * self._scale[: rows.arms]
        losses.sum().backward()
        self._loss[: rows.arms] += losses.detach()

    def loss(self) -> Tensor:
        return self._loss


class GraphPasses:
    """One CUDA graph per shape of micro-batch."""

    def __init__(
        self, model: Any, parameters: Sequence[nn.Parameter], device: torch.device, arms: int | None = None
    ) -> None:
        """The parameters' gradients become views of one buffer, which stays for as long as this does.

        Args:
            arms: adapters that train together; None: one.
        """
        self._model, self._device, self._arms = model, device, arms or 1
        self._gradients = flat_gradients(parameters, device)
        self._loss = torch.zeros(self._arms, device=device)
        self._scale = torch.zeros(self._arms, device=device)
        self._graphs: dict[Shape, tuple[Tensor, Callable[[], None]]] = {}
        self._stream = torch.cuda.Stream(device)
        self._pool: Any = torch.cuda.graph_pool_handle()
        self.capturing = True
        """False once a capture has failed, or memory beside the graphs was short: there are no graphs any more, and the
        rest runs operation by operation."""

    @cached_property
    def buckets(self) -> int:
        """Few for a small model, whose captures, some passes for every shape, take longer than padding; more for a
        large one, whose time grows with every token. On 4,096 rows of GSM8K, 4 a micro-batch, 4 and 8 sizes per octave
        have 1.09 and 1.05 times the tokens of plain padding, in 17 and 28 shapes."""
        return 8 if sum(value.numel() for value in self._model.parameters()) >= LARGE else 4

    @property
    def captured(self) -> int:
        """Shapes that have a graph."""
        return len(self._graphs)

    def begin(self, *tokens: int) -> None:
        self._gradients.zero_()
        self._loss.zero_()
        self._scale.copy_(_inverse(tokens, self._arms, self._device))

    def add(self, rows: Rows) -> None:
        if not self.capturing:
            self._pass(rows.to(self._device))
        elif rows.shape in self._graphs:
            self._replay(rows)
        else:
            self._add_new_shape(rows)

    def loss(self) -> Tensor:
        return self._loss.clone()  # the next step begins before this one's is read

    def _add_new_shape(self, rows: Rows) -> None:
        captures = len(self._graphs) < GRAPHS
        failure = self._capture(rows) if captures else self._pass_beside_the_graphs(rows)
        if failure is not None:
            self._drop_graphs()
            warnings.warn(failure, stacklevel=3)
            self._pass(rows.to(self._device))
        elif captures:
            self._replay(rows)

    def _pass(self, rows: Rows) -> None:
        losses = arm_losses(self._model, rows) * self._scale[: rows.arms]
        losses.sum().backward()
        self._loss[: rows.arms] += losses.detach()

    def _replay(self, rows: Rows) -> None:
        buffer, replay = self._graphs[rows.shape]
        buffer.copy_(_flat(rows), non_blocking=True)
        replay()

    def _capture(self, rows: Rows) -> str | None:
        """Capture the graph of a shape; gradients, loss and generator do not change.

        Returns:
            Why it failed, or None. No exception, since its traceback would hold the failed pass's activations.
        """
        before = None
        try:
            before = self._state()
            buffer = _flat(rows).to(self._device)
            inside = rows_in(buffer, rows.shape)
            graph = torch.cuda.CUDAGraph()
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UP):
                    self._pass(inside)
            torch.cuda.synchronize(self._device)
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                self._pass(inside)
        except RuntimeError as error:
            return _why_not(error)
        finally:
            if before is not None:
                torch.cuda.current_stream(self._device).wait_stream(self._stream)
                self._restore(before)
        self._graphs[rows.shape] = buffer, graph.replay
        return None

    def _pass_beside_the_graphs(self, rows: Rows) -> str | None:
        """A pass without a graph; returns why the graphs leave too little memory for it (nothing is added), or None."""
        before = None
        try:
            before = self._state()
            self._pass(rows.to(self._device))
        except torch.cuda.OutOfMemoryError as error:
            if before is not None:
                self._restore(before)
            return _why_not(error)
        return None

    def _drop_graphs(self) -> None:
        """Free the memory that graphs keep for themselves: each pass gets the whole device.

        Called when no exception of a failed pass is alive any more.
        """
        self.capturing = False
        torch.cuda.synchronize(self._device)  # a graph may still be running
        self._graphs.clear()
        self._pool = None
        gc.collect()  # compiled layers hold a failed pass's frames in cycles
        torch.cuda.empty_cache()

    def _state(self) -> tuple[Tensor, Tensor, Tensor]:
        """What a pass changes: gradients, loss and generator."""
        return self._gradients.clone(), self._loss.clone(), torch.cuda.get_rng_state(self._device)

    def _restore(self, state: tuple[Tensor, Tensor, Tensor]) -> None:
        gradients, loss, generator = state
        self._gradients.copy_(gradients)
        self._loss.copy_(loss)
        torch.cuda.set_rng_state(generator, self._device)


def _why_not(error: BaseException) -> str:
    """One line about a failed pass or capture."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, torch.cuda.OutOfMemoryError):
        cause = cause.__context__  # the end of a failed capture may raise an error of its own
    if cause is None:
        return f"no CUDA graph for this model, so each operation is launched: {error}"
    return (
        "the GPU's memory is too small for CUDA graphs beside a pass, so they are dropped and each operation is "
        f"launched (sft.acceleration: none does so from the start): {cause}"
    )


def flat_gradients(parameters: Sequence[nn.Parameter], device: torch.device) -> Tensor:
    """One buffer of zeros, of which the parameters' gradients become views.

    Raises:
        ValueError: a parameter is not float32.
    """
    sizes = [parameter.numel() for parameter in parameters]
    flat = torch.zeros(sum(sizes), dtype=torch.float32, device=device)
    for parameter, part in zip(parameters, flat.split(sizes), strict=True):
        if parameter.dtype != torch.float32:
            raise ValueError(f"trained parameters are float32, got {parameter.dtype}")
        parameter.grad = part.view_as(parameter)
    return flat


def _inverse(tokens: Sequence[int], arms: int, device: torch.device) -> Tensor:
    """[arms]: what each adapter's summed loss is multiplied by; 0 for those that take no step."""
    factors = [1.0 / max(1, count) for count in tokens]
    return on_device(torch.tensor(factors + [0.0] * (arms - len(factors))), device)


def _flat(rows: Rows) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in rows.tensors()]).pin_memory()


def compile_layers(model: Any) -> None:
    """Compile the decoder layers, which share their code: one compilation serves all of them."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    for module in model.get_base_model().modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile()
