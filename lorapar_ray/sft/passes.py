"""Forward and backward passes of a step: operation by operation, or as CUDA graphs.

A small model's step on a GPU is the time of thousands of launches. A CUDA graph launches them all at once, so each
shape of micro-batch (few, since lengths come in buckets) is captured when it first occurs and replayed from then on.
What a graph reads and writes stays where it is: the rows, the gradients, the loss.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lorapar_ray.sft.loss import summed_loss
from lorapar_ray.sft.rows import Rows, rows_in

GRAPHS = 32
"""Shapes that get a graph; what comes after them runs without."""
WARM_UP = 2
"""Passes before a capture: libraries choose algorithms and allocate workspaces in the first."""


class Passes(Protocol):
    """What a training loop asks for."""

    def begin(self, tokens: int) -> None:
        """Start a step whose loss is divided by so many tokens: no gradient, no loss yet."""

    def add(self, rows: Rows) -> None:
        """Add a micro-batch's gradients and loss; `rows` may still lie in host memory."""

    def loss(self) -> Tensor:
        """The step's loss so far, on the device."""


class EagerPasses:
    """Every operation launched by itself."""

    def __init__(self, model: Any, parameters: Sequence[nn.Parameter], device: torch.device) -> None:
        self._model, self._parameters, self._device = model, list(parameters), device
        self._scale = 0.0
        self._loss = torch.zeros((), device=device)

    def begin(self, tokens: int) -> None:
        self._scale = 1.0 / max(1, tokens)
        for parameter in self._parameters:
            parameter.grad = None
        self._loss = torch.zeros((), device=self._device)

    def add(self, rows: Rows) -> None:
        loss = summed_loss(self._model, rows.to(self._device)) * self._scale
        loss.backward()
        self._loss += loss.detach()

    def loss(self) -> Tensor:
        return self._loss


class GraphPasses:
    """One CUDA graph per shape of micro-batch."""

    def __init__(self, model: Any, parameters: Sequence[nn.Parameter], device: torch.device) -> None:
        """The parameters' gradients become views of one buffer, which stays for as long as this does."""
        self._model, self._device = model, device
        sizes = [parameter.numel() for parameter in parameters]
        self._gradients = torch.zeros(sum(sizes), dtype=torch.float32, device=device)
        for parameter, part in zip(parameters, self._gradients.split(sizes), strict=True):
            if parameter.dtype != torch.float32:
                raise ValueError(f"trained parameters are float32, got {parameter.dtype}")
            parameter.grad = part.view_as(parameter)
        self._loss = torch.zeros((), device=device)
        self._scale = torch.zeros((), device=device)
        self._graphs: dict[tuple[int, int, int, bool], tuple[Tensor, Callable[[], None]]] = {}
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self.capturing = True
        """False once a capture has failed: the rest runs operation by operation."""

    @property
    def captured(self) -> int:
        """Shapes that have a graph."""
        return len(self._graphs)

    def begin(self, tokens: int) -> None:
        self._gradients.zero_()
        self._loss.zero_()
        self._scale.fill_(1.0 / max(1, tokens))

    def add(self, rows: Rows) -> None:
        if rows.shape not in self._graphs and self.capturing and len(self._graphs) < GRAPHS:
            self._capture(rows)
        if rows.shape not in self._graphs:
            self._pass(rows.to(self._device))
            return
        buffer, replay = self._graphs[rows.shape]
        buffer.copy_(_flat(rows), non_blocking=True)
        replay()

    def loss(self) -> Tensor:
        return self._loss.clone()  # the next step begins before this one's is read

    def _pass(self, rows: Rows) -> None:
        loss = summed_loss(self._model, rows) * self._scale
        loss.backward()
        self._loss += loss.detach()

    def _capture(self, rows: Rows) -> None:
        """Make the graph for a shape; gradients, loss and generator are as if nothing had run."""
        buffer = _flat(rows).to(self._device)
        inside = rows_in(buffer, rows.shape)
        before = self._gradients.clone(), self._loss.clone(), torch.cuda.get_rng_state(self._device)
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        try:
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UP):
                    self._pass(inside)
            torch.cuda.synchronize(self._device)
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                self._pass(inside)
        except RuntimeError as error:
            self.capturing = False
            warnings.warn(f"no CUDA graph for this model, so each operation is launched: {error}", stacklevel=2)
        else:
            self._graphs[rows.shape] = buffer, graph.replay
        finally:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
            self._gradients.copy_(before[0])
            self._loss.copy_(before[1])
            torch.cuda.set_rng_state(before[2], self._device)


def _flat(rows: Rows) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in rows.tensors()]).pin_memory()


def compile_layers(model: Any) -> None:
    """Compile the decoder layers, which share their code: one compilation serves all of them."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    for module in model.get_base_model().modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile()
