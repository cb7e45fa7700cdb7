"""The loss of a micro-batch: the output head computes logits for the tokens that have one, and for no others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lorapar_ray.logprobs import token_logprobs
from lorapar_ray.sft.rows import Rows


def summed_loss(model: Any, rows: Rows) -> Tensor:
    """Minus the log-probability of the target tokens, summed: float32, scalar.

    Whatever the model does to its logits (soft caps, scales) counts. A model that puts virtual tokens before each row
    is fine; one without an output head of its own computes all logits.
    """
    taken = False

    def select(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        nonlocal taken
        taken = True
        return (_at_places(arguments[0], rows)[None],)

    head = model.get_output_embeddings()
    handle = None if head is None else head.register_forward_pre_hook(select)
    packing = {} if rows.position_ids is None else {"position_ids": rows.position_ids}
    try:
        logits = model(input_ids=rows.input_ids, use_cache=False, **packing).logits
    finally:
        if handle is not None:
            handle.remove()
    logits = logits.squeeze(0) if taken else _at_places(logits, rows)
    logprobs, _ = token_logprobs(logits, rows.targets)
    return -(logprobs * rows.weights).sum()


def _at_places(of_every_token: Tensor, rows: Rows) -> Tensor:
    """[N, …] of [B, virtual tokens + T, …]."""
    own = of_every_token[:, -rows.input_ids.shape[1] :]
    return own.flatten(0, 1).index_select(0, rows.places)


def mean_loss(model: Any, batches: list[Rows], device: torch.device, *, over_ranks: bool) -> float:
    """Mean loss per target token of all batches, of all ranks too if asked, each token counted once."""
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    with torch.no_grad():
        for batch in batches:
            rows = batch.to(device)
            totals[0] += summed_loss(model, rows)
            totals[1] += rows.weights.sum()
    if over_ranks:
        torch.distributed.all_reduce(totals)
    return float(totals[0] / totals[1])
