"""The loss of a micro-batch: the output head computes logits for the tokens that have one, and for no others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import masking_utils

from lorapar_ray.logprobs import token_logprobs
from lorapar_ray.sft.rows import Rows


def summed_loss(model: Any, rows: Rows) -> Tensor:
    """Minus the log-probability of the target tokens, summed: float32, scalar.

    What the model does to its logits (soft caps, scales) counts. A model that puts virtual tokens before each row
    is fine; one without an output head of its own computes all logits.
    """
    taken = False

    def select(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        nonlocal taken
        taken = True
        return (_at_places(arguments[0], rows)[None],)

    head = model.get_output_embeddings()
    handle = None if head is None else head.register_forward_pre_hook(select)
    try:
        if rows.position_ids is None:
            with _one_sequence_a_row():
                logits = model(input_ids=rows.input_ids, use_cache=False).logits
        else:
            logits = model(input_ids=rows.input_ids, position_ids=rows.position_ids, use_cache=False).logits
    finally:
        if handle is not None:
            handle.remove()
    logits = logits.squeeze(0) if taken else _at_places(logits, rows)
    logprobs, _ = token_logprobs(logits, rows.targets)
    return -(logprobs * rows.weights).sum()


@contextmanager
def _one_sequence_a_row() -> Iterator[None]:
    """Spare transformers the question whether rows are packed.

    It asks the device and waits for the answer; in a CUDA graph, where it cannot ask, it takes them as packed, and
    attention is computed under a mask of all pairs instead of by a causal kernel.
    """
    asked = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = asked


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
