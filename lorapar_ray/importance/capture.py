"""Exact per-example gradient sums of every LoRA element from one batched forward and backward pass.

For a linear map y = xWᵀ the gradient of example k is Σ_t (∂L_k/∂y_kt)ᵀ x_kt: inputs and output gradients are enough.
Both are at hand while autograd walks the graph, so each layer's per-example gradients [B, out, in] live only for the
moment in which they are summed and squared; with rank r they are small. Because F is the mean *square* of per-example
gradients, no quantity of the batch as a whole could replace them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lorapar_ray.adapters.keys import ADAPTER, adapter_parameters
from lorapar_ray.importance.batching import IGNORE
from lorapar_ray.importance.sums import GradSums


def gradient_sums(peft_model: Any, batches: Iterable[Mapping[str, Tensor]]) -> GradSums:
    """Σ∂L_k and Σ(∂L_k)² of every LoRA element over the examples of `batches`.

    L_k is the cross-entropy of example k averaged over its labelled tokens (method, section 2). Dropout is off
    meanwhile; the model is left as it was found, its parameters' `.grad` untouched.

    Args:
        peft_model: any PEFT LoRA model.
        batches: dicts of [B, T] tensors `input_ids`, `attention_mask`, `labels` (-100 where there is no loss), other
            keyword arguments of the model as wanted, and for packed rows `segment_ids`: the number of each token's
            example, from 0, and -1 for padding (attention between them is then the caller's business).

    Raises:
        ValueError: an example without a labelled token.
    """
    parameters = adapter_parameters(peft_model)
    sums = GradSums.zeros(dict(parameters))
    device = next(iter(parameters.values())).device
    with _scoring(peft_model, sums) as capture:
        for batch in batches:
            inputs = {key: value.to(device) for key, value in batch.items()}
            segments = inputs.pop("segment_ids", None)
            capture.segments = segments
            losses = example_losses(peft_model, inputs, segments)
            losses.sum().backward()
            sums.n += len(losses)
    return sums


def example_losses(model: Any, inputs: dict[str, Tensor], segments: Tensor | None = None) -> Tensor:
    """Mean cross-entropy over each example's labelled tokens, float32, [examples]."""
    inputs = dict(inputs)
    labels = inputs.pop("labels")
    start = max(1, int((labels != IGNORE).any(dim=0).int().argmax()))
    options: dict[str, Any] = {"use_cache": False}
    if "logits_to_keep" in inspect.signature(_inner(model).forward).parameters:
        options["logits_to_keep"] = labels.shape[1] - start + 1  # no vocabulary-wide logits for the prompt
    logits = model(**inputs, **options).logits[:, -(labels.shape[1] - start + 1) : -1]
    targets = labels[:, start:]
    token_losses = functional.cross_entropy(
        logits.float().transpose(1, 2), targets, ignore_index=IGNORE, reduction="none"
    )
    labelled = targets != IGNORE
    if segments is None:
        owner = torch.arange(len(labels), device=labels.device)[:, None].expand_as(targets)
        count = len(labels)
    else:
        owner = segments[:, start:]
        count = int(segments.max()) + 1
    tokens = torch.zeros(count, device=labels.device).index_add_(0, owner[labelled], labelled[labelled].float())
    if (tokens == 0).any():
        raise ValueError("an example has no labelled token; is its response empty or cut off by max_length?")
    sums = torch.zeros(count, device=labels.device).index_add(0, owner[labelled], token_losses[labelled])
    return sums / tokens


class _Capture:
    """Hooks on every LoRA A and B that add each example's gradient to the sums as backward reaches it."""

    def __init__(self, sums: GradSums) -> None:
        self.sums = sums
        self.segments: Tensor | None = None

    def watch(self, key: str, layer: nn.Module) -> Any:
        def after_forward(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if output.requires_grad:
                seen = inputs[0].detach()
                output.register_hook(lambda gradient: self._add(key, gradient, seen))

        return layer.register_forward_hook(after_forward)

    def _add(self, key: str, gradient: Tensor, inputs: Tensor) -> None:
        first, second = self.sums.first[key], self.sums.second[key]
        with torch.no_grad():
            for g, x in self._examples(gradient.float(), inputs.float()):
                per_example = torch.bmm(g.transpose(1, 2), x)
                first += per_example.sum(0)
                second += per_example.square_().sum(0)

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
    was_training = peft_model.training
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
        yield capture
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trainable:
            parameter.requires_grad_(True)
        peft_model.train(was_training)


def _inner(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
