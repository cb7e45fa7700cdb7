"""The loss of a micro-batch: the output head computes logits only for tokens with a loss."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import masking_utils

from lorapar_ray.logprobs import token_logprobs
from lorapar_ray.sft.rows import Rows


def arm_losses(model: Any, rows: Rows) -> Tensor:
    """Minus the log-probability of the target tokens, summed over each adapter's: float32 [arms]."""
    return of_each_arm(token_losses(model, rows), rows)


def of_each_arm(values_N: Tensor, rows: Rows) -> Tensor:
    """Sums [arms] of `values_N`, by arm."""
    if rows.arm_N is None:
        return values_N.sum()[None]
    return values_N.new_zeros(rows.arms).index_add(0, rows.arm_N, values_N)


def token_losses(model: Any, rows: Rows) -> Tensor:
    """Minus the log-probability of each target token: float32 [N], 0 for padding.

    Changes that the model makes to its logits (soft caps, scales) are included. A model that puts virtual tokens before
    each row works; one without a separate output head computes all logits.
    """
    taken = False

    def select(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        nonlocal taken
        taken = True
        return (_at_places(arguments[0], rows)[None],)

    inputs: dict[str, Any] = {"input_ids": rows.input_ids, "use_cache": False}
    if rows.arms > 1:
        inputs["arms"] = rows.arms
    head = model.get_output_embeddings()
    handle = None if head is None else head.register_forward_pre_hook(select)
    try:
        if rows.position_ids is None:
            with _one_sequence_a_row():
                logits = model(**inputs).logits
        else:
            logits = model(**inputs, position_ids=rows.position_ids).logits
    finally:
        if handle is not None:
            handle.remove()
    logits = logits.squeeze(0) if taken else _at_places(logits, rows)
    logprobs, _ = token_logprobs(logits, rows.targets)
    return -(logprobs * rows.weights)


@contextmanager
def _one_sequence_a_row() -> Iterator[None]:
    """Skip transformers' check for packed rows.

    The check waits for the device; in a CUDA graph, where it cannot, it assumes packed rows and computes attention with
    a full mask instead of a causal kernel.
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


def mean_loss(model: Any, batches: Sequence[Rows], device: torch.device, *, over_ranks: bool) -> float:
    """Mean loss per target token of all batches, of all ranks too if asked, each token counted once."""
    return mean_losses(model, batches, device, arms=1, over_ranks=over_ranks)[0]


def mean_losses(
    model: Any, batches: Iterable[Rows], device: torch.device, *, arms: int, over_ranks: bool
) -> list[float]:
    """The same of each of `arms` adapters; NaN for one without a target token."""
    totals = torch.zeros(2, arms, dtype=torch.float64, device=device)
    with torch.no_grad():
        for batch in batches:
            rows = batch.to(device)
            totals[0, : rows.arms] += arm_losses(model, rows)
            totals[1, : rows.arms] += of_each_arm(rows.weights, rows)
    if over_ranks:
        torch.distributed.all_reduce(totals)
    found: list[float] = (totals[0] / totals[1]).tolist()
    return found
