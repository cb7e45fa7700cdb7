"""Log-probabilities of sampled tokens, in float32."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def token_logprobs(
    logits_BTV: Tensor | Iterable[Tensor], tokens_BT: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(log-probabilities [B, T], entropy [B, T] without gradient), both float32, of the tempered distribution.

    Row by row, so that only one [T, V] block exists in float32 beside the logits; they may be given as an iterable of
    [T, V].
    """
    logprobs, entropies = [], []
    for logits_TV, tokens_T in zip(logits_BTV, tokens_BT, strict=True):
        scaled_TV = logits_TV.float() / temperature
        total_T = scaled_TV.logsumexp(-1)
        logprobs.append(scaled_TV.gather(-1, tokens_T[:, None]).squeeze(-1) - total_T)
        with torch.no_grad():
            entropies.append(total_T - (scaled_TV.softmax(-1) * scaled_TV).sum(-1))
    return torch.stack(logprobs), torch.stack(entropies)
