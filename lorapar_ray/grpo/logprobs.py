"""Log-probabilities of sampled tokens, in float32."""

from __future__ import annotations

import torch
from torch import Tensor


def token_logprobs(
    logits_BTV: Tensor, tokens_BT: Tensor, *, temperature: float = 1.0, return_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(log-probabilities [B, T], entropy [B, T] without gradient or None), both float32, of the tempered distribution.

    Row by row, so that only one [T, V] block exists in float32 beside the logits.
    """
    logprobs, entropies = [], []
    for logits_TV, tokens_T in zip(logits_BTV, tokens_BT, strict=True):
        scaled_TV = logits_TV.float() / temperature
        total_T = scaled_TV.logsumexp(-1)
        logprobs.append(scaled_TV.gather(-1, tokens_T[:, None]).squeeze(-1) - total_T)
        if return_entropy:
            with torch.no_grad():
                entropies.append(total_T - (scaled_TV.softmax(-1) * scaled_TV).sum(-1))
    return torch.stack(logprobs), torch.stack(entropies) if return_entropy else None
