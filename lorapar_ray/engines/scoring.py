"""What the check of a served policy asks of vLLM: log-probabilities of given tokens, and decoding after a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

DECODING = {"max_tokens": 4, "temperature": 1.0, "seed": 0}
"""Sampling settings of the decoding that is compared with a computation without the cache."""


def scoring_params() -> Any:
    """vLLM's parameters of a request for `scored`; such a request never reads the prefix cache."""
    from vllm import SamplingParams

    return SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=1.0)


def scored(output: Any, token_ids: Sequence[int], start: int) -> list[float]:
    """Log-probabilities of `token_ids[start:]` in the answer to a request with `scoring_params`."""
    pairs = list(zip(output.prompt_logprobs, token_ids, strict=True))[start:]
    return [entry[token].logprob for entry, token in pairs]


def sampling_params(sampling: dict[str, Any]) -> Any:
    """vLLM's parameters of a request for `sampled_logprobs`."""
    from vllm import SamplingParams

    return SamplingParams(**{**sampling, "logprobs": 0, "flat_logprobs": True})


def sampled_logprobs(choice: Any) -> list[float]:
    """Log-probabilities of a completion's tokens."""
    return [choice.logprobs.logprobs[at] for at in choice.logprobs.start_indices]
