"""Replaces redundant work of vLLM's CPU path on one engine's objects; runs inside vLLM's worker.

The first two save nearly half of a decoding step of a small model:

- Seeded sampling draws a random number for every vocabulary entry of each sequence (and again for the whole batch). One
  number per sequence, compared with the cumulative distribution, samples the same distribution.
- A float32 output head with bfloat16 weights casts all weights at every step. Here the cast weights are kept.
- Prompt log-probabilities are computed for the whole prompt; an evaluation needs only those of a short continuation.
- LoRA products copy an adapter's matrices for each token (`lora_products.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lorapar_ray.cpu.lora_products import replace_lora_products

Generators = dict[int, torch.Generator]
SCORED_FROM = "lorapar_scored_from"
"""Key of a request's `extra_args`: the first prompt token whose log-probability is needed."""


def lighten(model_runner: Any) -> None:
    """Install the replacements on a model runner; skips parts that this version of vLLM lacks."""
    sampler = getattr(getattr(model_runner, "sampler", None), "topk_topp_sampler", None)
    if sampler is not None and getattr(sampler, "logprobs_mode", None) == "processed_logprobs":
        sampler.forward = sample_and_logprobs
    processor: Any = getattr(getattr(model_runner, "model", None), "logits_processor", None)
    processor = getattr(processor, "base_layer", processor)  # with LoRA another layer wraps it
    if getattr(processor, "head_dtype", None) == torch.float32 and hasattr(processor, "_apply_head"):
        processor._apply_head = Float32Head()
    if hasattr(model_runner, "_get_prompt_logprobs_dict") and hasattr(model_runner, "num_prompt_logprobs"):
        model_runner._get_prompt_logprobs_dict = WantedPromptLogprobs(model_runner)
    replace_lora_products(getattr(model_runner, "model", None))


def sample_and_logprobs(
    logits_BV: Tensor, generators: Generators, k: Tensor | None, p: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One token per row and the log-probabilities it was drawn from; replaces `TopKTopPSampler.forward`.

    Args:
        generators: of the rows with a seed.
        k, p: top-k and top-p by row, or None.
    """
    if k is not None or p is not None:
        from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

        logits_BV = apply_top_k_top_p(logits_BV, k, p)
    logprobs_BV = logits_BV.log_softmax(dim=-1, dtype=torch.float32)
    return draw(logprobs_BV, generators), logprobs_BV


def draw(logprobs_BV: Tensor, generators: Generators) -> Tensor:
    """Sample each row by the inverse of its cumulative distribution, in float64: one random number per row."""
    cumulative_BV = logprobs_BV.exp().cumsum(dim=-1, dtype=torch.float64)
    uniform_B = torch.rand(len(logprobs_BV), dtype=torch.float64)
    for row, generator in generators.items():
        uniform_B[row] = torch.rand((), generator=generator, dtype=torch.float64)
    wanted_B1 = (uniform_B * cumulative_BV[:, -1]).unsqueeze(1)
    token_B1 = torch.searchsorted(cumulative_BV, wanted_B1, right=True)  # right: never a token of probability 0
    return token_B1.squeeze(1).clamp(max=cumulative_BV.shape[1] - 1)


class Float32Head:
    """Replaces `LogitsProcessor._apply_head`: casts the head's weights only when they have changed."""

    def __init__(self) -> None:
        self._seen: tuple[int, int] | None = None
        self._weight: Tensor = torch.empty(0)

    def __call__(self, lm_head: Any, hidden_states: Tensor, embedding_bias: Tensor | None) -> Tensor:
        weight: Tensor = lm_head.weight
        seen = weight.data_ptr(), weight._version
        if seen != self._seen:
            self._weight, self._seen = weight.float(), seen
        bias = None if embedding_bias is None else embedding_bias.float()
        return functional.linear(hidden_states.float(), self._weight, bias)


class WantedPromptLogprobs:
    """Replaces `GPUModelRunner._get_prompt_logprobs_dict`: leaves out the tokens before `SCORED_FROM`."""

    def __init__(self, model_runner: Any) -> None:
        self._runner = model_runner
        self._all = model_runner._get_prompt_logprobs_dict

    def __call__(self, hidden_states: Tensor, num_scheduled_tokens: dict[str, int]) -> dict[str, Any]:
        """Like vLLM's function; rows of its tensors before `SCORED_FROM` are not set.

        For vLLM the omitted tokens seem computed in an earlier step: during the call the number of computed tokens is
        larger, and the hidden states begin later by the same number.
        """
        runner, found = self._runner, dict[str, Any]()
        groups: dict[int, dict[str, int]] = {}
        unfinished: dict[str, int] = {}
        for request, count in runner.num_prompt_logprobs.items():
            groups.setdefault(self._skipped(request, num_scheduled_tokens), {})[request] = count
        for skip, group in groups.items():
            states = [runner.requests[request] for request in group]
            later = {request: num_scheduled_tokens[request] - skip for request in group if skip}
            runner.num_prompt_logprobs = group
            for state in states:
                state.num_computed_tokens += skip
            found |= self._all(hidden_states[skip:], num_scheduled_tokens | later)
            for state in states:
                state.num_computed_tokens -= skip
            unfinished |= group  # vLLM removes the complete ones
        runner.num_prompt_logprobs = unfinished
        return found

    def _skipped(self, request: str, num_scheduled_tokens: dict[str, int]) -> int:
        """Number of first tokens of this step whose next tokens' log-probabilities are not needed."""
        state, scheduled = self._runner.requests[request], num_scheduled_tokens.get(request, 0)
        wanted = (getattr(state.sampling_params, "extra_args", None) or {}).get(SCORED_FROM, 0)
        return int(max(0, min(wanted - 1 - state.num_computed_tokens, scheduled)))
