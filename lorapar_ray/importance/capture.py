"""Exact per-example gradient sums of every LoRA element from one batched forward and backward pass.

For a linear map y = xWᵀ the gradient of example k is Σ_t (∂L_k/∂y_kt)ᵀ x_kt: inputs and output gradients are enough.
Both are available during the backward pass, so each layer's per-example gradients exist only while they are summed and
squared; with rank r they are small. F is the mean *square* of per-example gradients, so batch gradients cannot replace
them.

While it scores, an adapted layer computes y + s·B(Ax) in the base's dtype, while PEFT would cast its inputs and outputs
to the adapter's float32; sums and products of sums stay in float32. Layers that share their input (q, k, v; gate, up)
share one product with all their A's, and one for all those A's gradients.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lorapar_ray.adapters.keys import adapter_parameters
from lorapar_ray.errors import UserError
from lorapar_ray.importance.batching import Layout, layout_of
from lorapar_ray.importance.losses import losses_of
from lorapar_ray.importance.segments import add_segment_products
from lorapar_ray.importance.sites import SiteGroup, site_groups
from lorapar_ray.importance.sums import GradSums
from lorapar_ray.packed_attention import packed_attention_of
from lorapar_ray.transfer import on_device

LOSS_ONLY = ("labels", "lengths")
"""Keys of a batch that are not passed to the model."""


def gradient_sums(peft_model: Any, batches: Iterable[Mapping[str, Tensor]]) -> GradSums:
    """Σ∂L_k and Σ(∂L_k)² of every LoRA element over the examples of `batches`.

    L_k is the cross-entropy of example k averaged over its labelled tokens (paper, section 3.2). Dropout is off during
    this, and gradient checkpointing stays on if it is enabled. Afterwards the model is unchanged, also its parameters'
    `.grad`.

    Args:
        peft_model: any PEFT LoRA model.
        batches: dicts of [B, T] tensors `input_ids`, `attention_mask`, `labels` (-100 where there is no loss), and
            optionally other keyword arguments of the model; or batches from `pack`, for a model that `packs`. Best on
            the CPU, where the layout is computed.

    Raises:
        UserError: an adapted layer does not get every token of the batch (for example an expert), so its gradient
            cannot be split by example; or is used more than once; or is not a plain LoRA.
        ValueError: an example without a labelled token.
    """
    with scoring(peft_model) as scorer:
        sums = scorer.new_sums()
        for batch in batches:
            scorer.add(batch, sums)
    return sums


def example_losses(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean cross-entropy over each example's labelled tokens, float32, [examples]."""
    device = next(model.parameters()).device
    layout = layout_of(dict(batch), device)
    with attention_of(model, layout):
        return losses_of(model, inputs_of(batch, layout, device), layout)


class Scorer:
    """Adds batches of examples to sums; see `scoring`."""

    def __init__(self, peft_model: Any) -> None:
        self.model = peft_model
        self.parameters = adapter_parameters(peft_model)
        self.device = next(iter(self.parameters.values())).device
        self.groups = site_groups(peft_model, set(self.parameters))
        self._sums: GradSums | None = None
        self._layout: Layout | None = None
        self._seen: set[str] = set()

    def new_sums(self) -> GradSums:
        """Start without examples; the A's of a group are stacked, so that one product computes them all."""
        first: dict[str, Tensor] = {}
        second: dict[str, Tensor] = {}
        for group in self.groups:
            for sums in (first, second):
                block = torch.zeros(sum(group.ranks), group.sites[0].A.shape[1], device=self.device)
                for site, part in zip(group.sites, block.split(group.ranks), strict=True):
                    sums[site.keys[0]] = part
                    sums[site.keys[1]] = torch.zeros_like(site.B, dtype=torch.float32)
        return GradSums(0, *({key: sums[key] for key in self.parameters} for sums in (first, second)))

    def add(self, batch: Mapping[str, Tensor], sums: GradSums) -> None:
        """Forward and backward over the batch's examples; `sums` must be of `new_sums`."""
        layout = layout_of(dict(batch), self.device)
        self._sums, self._layout = sums, layout
        self._seen.clear()
        try:
            # until the backward pass ends, since checkpointed layers run forward again
            with attention_of(self.model, layout):
                losses_of(self.model, inputs_of(batch, layout, self.device), layout).sum().backward()
        finally:
            self._sums = self._layout = None
        sums.n += len(layout.lengths)

    def forward(self, group: SiteGroup, number: int, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        """What an adapted layer computes while scoring."""
        site = group.sites[number]
        base: Tensor = site.layer.base_layer(x, *arguments, **options)
        if self._layout is None:  # a test pass of the model
            return base + ((x @ group.A(x.dtype).T).split(group.ranks, -1)[number] @ group.sB(number, x.dtype).T)
        seen, expected = x.shape[:-1].numel(), self._layout.tokens
        if seen != expected:
            raise UserError(
                f"'{site.keys[0]}' sees {seen} of {expected} tokens; leave its layer out of adapter.targets"
            )
        output: Tensor = _Up.apply(base, self._hidden(group, number, x), group, number, self)
        return output

    def _hidden(self, group: SiteGroup, number: int, x: Tensor) -> Tensor:
        """A x of one site, [T, r]; a slice of the group's product if all sites get the same tensor in turn."""
        if number == 0:
            group.shared = (weakref.ref(x), _Down.apply(x, group, self))
        if group.shared is None or group.shared[0]() is not x:
            alone: Tensor = _Down.apply(x, SiteGroup([group.sites[number]]), self)[0]
            return alone
        hidden = group.shared[1][number]
        if number == len(group.sites) - 1:
            group.shared = None
        return hidden

    def add_down(self, group: SiteGroup, gradient: Tensor, x: Tensor) -> None:
        """The gradients of a group's A's: of [T, R] and [T, in]."""
        assert self._sums is not None and self._layout is not None
        sums, layout = self._sums, self._layout
        first, second = (_block(part, group) for part in (sums.first, sums.second))
        add_segment_products(gradient, x.reshape(-1, x.shape[-1]), layout, first, second)

    def add_up(self, group: SiteGroup, number: int, gradient: Tensor, hidden: Tensor) -> None:
        """The gradient of a B: of [T, out] and [T, r]."""
        site = group.sites[number]
        assert self._sums is not None and self._layout is not None
        sums, layout = self._sums, self._layout
        if site.name in self._seen:
            raise UserError(f"'{site.name}' is used more than once in a pass; leave it out of adapter.targets")
        self._seen.add(site.name)
        first, second = (part[site.keys[1]].T for part in (sums.first, sums.second))
        add_segment_products(hidden, gradient, layout, first, second, site.scaling)


class _Down(torch.autograd.Function):
    """x [.., in] times every A of a group: [T, r] for each; the backward pass gives the gradients of those A's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: SiteGroup, scorer: Scorer) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x)
        ctx.group, ctx.scorer = group, scorer
        hidden = x.reshape(-1, x.shape[-1]) @ group.A(x.dtype).T
        return tuple(part.contiguous() for part in hidden.split(group.ranks, -1))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        gradient = torch.cat(gradients, -1)
        ctx.scorer.add_down(ctx.group, gradient, x)
        return (gradient @ ctx.group.A(x.dtype)).view_as(x), None, None


class _Up(torch.autograd.Function):
    """base [.., out] + s·B h for h [T, r], the backward pass gives the gradient of B."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, hidden: Tensor, group: SiteGroup, number: int, scorer: Scorer) -> Tensor:
        ctx.save_for_backward(hidden)
        ctx.group, ctx.number, ctx.scorer = group, number, scorer
        flat = base.reshape(-1, base.shape[-1])
        return torch.addmm(flat, hidden, group.sB(number, hidden.dtype).T.to(flat.dtype)).view_as(base)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        (hidden,) = ctx.saved_tensors
        flat = gradient.reshape(-1, gradient.shape[-1])
        ctx.scorer.add_up(ctx.group, ctx.number, flat, hidden)
        return gradient, flat @ ctx.group.sB(ctx.number, flat.dtype), None, None, None


@contextmanager
def scoring(peft_model: Any) -> Iterator[Scorer]:
    """Evaluation mode, with replaced forward functions in the adapted layers, and gradients from the embeddings on.

    Raises:
        UserError: an adapted layer is not a plain LoRA of a linear layer.
    """
    scorer = Scorer(peft_model)
    training = [module for module in peft_model.modules() if module.training]
    trainable = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
    patched = [
        (site.layer, partial(scorer.forward, group, number))
        for group in scorer.groups
        for number, site in enumerate(group.sites)
    ]
    before = [layer.__dict__.get("forward") for layer, _ in patched]
    embeddings = peft_model.get_input_embeddings()
    handle = embeddings.register_forward_hook(lambda _, __, output: output.requires_grad_(True))
    peft_model.eval()
    for parameter in trainable:
        parameter.requires_grad_(False)
    for layer, forward in patched:
        layer.forward = forward
    try:
        with _checkpointing(peft_model):
            yield scorer
    finally:
        handle.remove()
        for (layer, _), own in zip(patched, before, strict=True):
            del layer.forward
            if own is not None:
                layer.forward = own
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True


def _block(sums: Mapping[str, Tensor], group: SiteGroup) -> Tensor:
    """The sums of a group's A's as one [R, in], in the memory that `Scorer.new_sums` laid out."""
    top = sums[group.sites[0].keys[0]]
    return top.as_strided((sum(group.ranks), top.shape[1]), top.stride())


def inputs_of(batch: Mapping[str, Tensor], layout: Layout, device: torch.device) -> dict[str, Any]:
    """The model's keyword arguments for a batch."""
    inputs = {key: on_device(value, device) for key, value in batch.items() if key not in LOSS_ONLY}
    return inputs if layout.attention is None else {**inputs, "packed_layout": layout.attention}


def attention_of(model: Any, layout: Layout) -> AbstractContextManager[None]:
    """Inside this context `model` computes attention for a batch of this layout, packed or padded."""
    return nullcontext() if layout.attention is None else packed_attention_of(model)


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
