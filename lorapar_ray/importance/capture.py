"""Exact per-example gradient sums of every LoRA element from one batched forward and backward pass.

For a linear map y = xWᵀ the gradient of example k is Σ_t (∂L_k/∂y_kt)ᵀ x_kt: inputs and output gradients are enough.
Both are at hand while autograd walks the graph, so each layer's per-example gradients [B, out, in] live only for the
moment in which they are summed and squared; with rank r they are small. Because F is the mean *square* of per-example
gradients, no quantity of the batch as a whole could replace them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lorapar_ray.adapters.keys import ADAPTER, adapter_parameters
from lorapar_ray.datasets.chat import NO_LOSS
from lorapar_ray.errors import UserError
from lorapar_ray.importance.sums import GradSums
from lorapar_ray.logprobs import logits_at


def gradient_sums(peft_model: Any, batches: Iterable[Mapping[str, Tensor]]) -> GradSums:
    """Σ∂L_k and Σ(∂L_k)² of every LoRA element over the examples of `batches`.

    L_k is the cross-entropy of example k averaged over its labelled tokens (method, section 2). Dropout is off
    meanwhile, and gradient checkpointing stays on where it is enabled; the model is left as it was found, its
    parameters' `.grad` untouched.

    Args:
        peft_model: any PEFT LoRA model.
        batches: dicts of [B, T] tensors `input_ids`, `attention_mask`, `labels` (-100 where there is no loss), other
            keyword arguments of the model as wanted, and for packed rows `segment_ids`: the number of each token's
            example, from 0, and -1 for padding (attention between them is then the caller's business).

    Raises:
        UserError: an adapted layer does not see every token of the batch (an expert, say), so that its gradient cannot
            be told apart by example.
        ValueError: an example without a labelled token.
    """
    parameters = adapter_parameters(peft_model)
    sums = GradSums.zeros(dict(parameters))
    device = next(iter(parameters.values())).device
    with _scoring(peft_model, sums) as capture:
        for batch in batches:
            inputs = {key: value.to(device) for key, value in batch.items()}
            segments = inputs.pop("segment_ids", None)
            capture.shape, capture.segments = tuple(inputs["labels"].shape), segments
            losses = example_losses(peft_model, inputs, segments)
            losses.sum().backward()
            sums.n += len(losses)
    return sums


def example_losses(model: Any, inputs: Mapping[str, Tensor], segments: Tensor | None = None) -> Tensor:
    """Mean cross-entropy over each example's labelled tokens, float32, [examples]."""
    labels = inputs["labels"]
    targets = functional.pad(labels[:, 1:], (0, 1), value=NO_LOSS)  # column t predicts token t + 1
    labelled = targets != NO_LOSS
    if segments is not None:
        labelled &= segments == torch.roll(segments, -1, dims=1)  # no example predicts the next one's first token
    logits = logits_at(labelled, model, {key: value for key, value in inputs.items() if key != "labels"})
    token_losses = functional.cross_entropy(logits.float(), targets[labelled], reduction="none")
    if segments is None:
        owner, count = torch.arange(len(labels), device=labels.device)[:, None].expand_as(labels), len(labels)
    else:
        owner, count = segments, int(segments.max()) + 1
    tokens = torch.bincount(owner[labelled], minlength=count)
    if (tokens == 0).any():
        raise ValueError("an example has no labelled token; is its response empty or cut off by max_length?")
    return torch.zeros(count, device=labels.device).index_add(0, owner[labelled], token_losses) / tokens


class _Tap(torch.autograd.Function):
    """The identity, whose backward shows the gradient together with a tensor of the forward pass.

    Saving that tensor through autograd, rather than in a closure, lets gradient checkpointing drop and recompute it.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, inputs: Tensor, see: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.see = see
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.see(gradient, *ctx.saved_tensors)
        return gradient, None, None


class _Capture:
    """Hooks on every LoRA A and B that add each example's gradient to the sums as backward reaches it."""

    def __init__(self, sums: GradSums) -> None:
        self.sums = sums
        self.shape: tuple[int, ...] = ()
        self.segments: Tensor | None = None

    def watch(self, key: str, layer: nn.Module) -> Any:
        def after_forward(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return _Tap.apply(output, inputs[0].detach(), partial(self._add, key)) if output.requires_grad else output

        return layer.register_forward_hook(after_forward)

    def _add(self, key: str, gradient: Tensor, inputs: Tensor) -> None:
        first, second = self.sums.first[key], self.sums.second[key]
        for g, x in self._examples(self._by_row(key, gradient), self._by_row(key, inputs)):
            per_example = torch.bmm(g.transpose(1, 2), x)
            first += per_example.sum(0)
            second += per_example.square_().sum(0)

    def _by_row(self, key: str, value: Tensor) -> Tensor:
        """Float32 [B, T, features]; the shared expert of a mixture gets its tokens as [B·T, features]."""
        rows, width = self.shape
        if value.shape[:-1].numel() != rows * width:
            seen = value.shape[:-1].numel()
            raise UserError(f"'{key}' sees {seen} of {rows * width} tokens; leave its layer out of adapter.targets")
        return value.reshape(rows, width, -1).float()

    def _examples(self, gradient: Tensor, inputs: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(output gradients [B, T, out], inputs [B, T, in]) of whole examples."""
        if self.segments is None:
            yield gradient, inputs
            return
        for segment in range(int(self.segments.max()) + 1):
            mine = self.segments == segment
            yield gradient[mine][None], inputs[mine][None]


@contextmanager
def _scoring(peft_model: Any, sums: GradSums) -> Iterator[_Capture]:
    """Evaluation mode, hooks in place, and gradients flowing from the embeddings instead of into parameters."""
    capture = _Capture(sums)
    training = [module for module in peft_model.modules() if module.training]
    trainable = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
    handles = [
        capture.watch(f"{name.removesuffix(f'.{ADAPTER}')}.weight", module)
        for name, module in peft_model.named_modules()
        if name.endswith((f".lora_A.{ADAPTER}", f".lora_B.{ADAPTER}"))
    ]
    embeddings = peft_model.get_input_embeddings()
    handles.append(embeddings.register_forward_hook(lambda _, __, output: output.requires_grad_(True)))
    peft_model.eval()
    for parameter in trainable:
        parameter.requires_grad_(False)  # autograd would otherwise form each weight gradient a second time
    try:
        with _checkpointing(peft_model):
            yield capture
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True


@contextmanager
def _checkpointing(model: nn.Module) -> Iterator[None]:
    """Checkpoint the layers that have it enabled; transformers itself only does in training mode, which has dropout."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    wrapped = {layer: layer.__dict__.get("forward") for layer in layers if layer.gradient_checkpointing}
    for layer in wrapped:
        layer.forward = partial(_checkpointed, layer._gradient_checkpointing_func, layer.forward)
    try:
        yield
    finally:
        for layer, own in wrapped.items():
            del layer.forward
            if own is not None:
                layer.forward = own


def _checkpointed(checkpoint: Callable[..., Any], forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return checkpoint(partial(forward, **kwargs), *args)
