"""Other implementations of the sums of per-example gradients and their squares, for `jobs/benchmarks/importance.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from lorapar_ray.adapters import adapter_parameters
from lorapar_ray.importance import GradSums, TokenizedExample, collate
from lorapar_ray.importance.batching import layout_of
from lorapar_ray.importance.capture import attention_of, inputs_of
from lorapar_ray.logprobs import logits_at


def plain_training(model: Any, batches: list[dict[str, Tensor]]) -> None:
    """A training step without its optimiser, over packed batches."""
    for batch in batches:
        plain_losses(model, batch).sum().backward()
        model.zero_grad()


def plain_losses(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Each example's mean loss in the usual way: PEFT's forward pass, float32 logits of the labelled positions."""
    device = next(model.parameters()).device
    layout = layout_of(batch, device)
    rows, columns = layout.predicting // layout.shape[1], layout.predicting % layout.shape[1]
    with attention_of(model, layout):
        logits = logits_at((rows, columns), model, inputs_of(batch, layout, device))
    losses = functional.cross_entropy(logits.float(), layout.targets, reduction="none")
    return torch.zeros(len(layout.lengths), device=device).index_add(0, layout.owner, losses * layout.weights)


def one_by_one(model: Any, examples: list[TokenizedExample]) -> GradSums:
    """Autograd on batches of one."""
    parameters = adapter_parameters(model)
    sums = GradSums.zeros(dict(parameters))
    for example in examples:
        loss = plain_losses(model, collate([example], pad_id=0))[0]
        for key, gradient in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
            sums.first[key] += gradient
            sums.second[key] += gradient.square_()
        sums.n += 1
    return sums


def by_vmap(model: Any, batches: list[dict[str, Tensor]]) -> GradSums:
    """Per-example gradients from torch.func. The mask is built before, since building one depends on data."""
    keys = {id(parameter): key for key, parameter in adapter_parameters(model).items()}
    names = {keys[id(parameter)]: name for name, parameter in model.named_parameters() if id(parameter) in keys}
    parameters = {key: parameter.detach() for key, parameter in adapter_parameters(model).items()}
    sums = GradSums.zeros(parameters)

    def loss(values: dict[str, Tensor], ids: Tensor, positions: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        swapped = {names[key]: value for key, value in values.items()}
        inputs = {"input_ids": ids[None], "position_ids": positions[None], "attention_mask": mask[None]}
        logits = functional_call(model, swapped, (), {**inputs, "use_cache": False}).logits[0, :-1]
        return functional.cross_entropy(logits.float(), labels[1:])

    attention = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        for batch in batches:
            ids, positions, labels = batch["input_ids"], batch["position_ids"], batch["labels"]
            mask = causal_mask(batch["attention_mask"], next(iter(model.parameters())).dtype)
            gradients = vmap(grad(loss), in_dims=(None, 0, 0, 0, 0))(parameters, ids, positions, labels, mask)
            for key, gradient in gradients.items():
                sums.first[key] += gradient.sum(0)
                sums.second[key] += gradient.square_().sum(0)
            sums.n += len(ids)
    finally:
        model.set_attn_implementation(attention)
    return sums


def causal_mask(present: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask [B, 1, T, T] from an attention mask [B, T]; every token sees itself, padding too."""
    width = present.shape[1]
    square = torch.ones(width, width, dtype=torch.bool, device=present.device)
    visible = square.tril() & present.bool()[:, None]
    visible |= torch.eye(width, dtype=torch.bool, device=present.device)
    return torch.zeros(visible.shape, dtype=dtype, device=present.device).masked_fill(~visible, torch.finfo(dtype).min)[
        :, None
    ]


def by_opacus(model: Any, batches: list[dict[str, Tensor]]) -> GradSums:
    """Per-example gradients from Opacus's hooks: each parameter holds those of a whole batch."""
    from opacus.grad_sample import GradSampleModule

    parameters = adapter_parameters(model)
    sums = GradSums.zeros(dict(parameters))
    sampled = GradSampleModule(model, loss_reduction="sum", strict=False)
    model.train()  # Opacus records nothing in evaluation mode; the benchmark's adapter has no dropout
    try:
        for batch in batches:
            losses = plain_losses(model, batch)
            losses.sum().backward()
            for key, parameter in parameters.items():
                gradients: Tensor = parameter.grad_sample  # type: ignore[attr-defined]
                sums.first[key] += gradients.sum(0)
                sums.second[key] += gradients.square_().sum(0)
                parameter.grad_sample = None  # type: ignore[attr-defined]
                parameter.grad = None
            sums.n += len(losses)
    finally:
        model.eval()
        sampled.to_standard_module()
    return sums
