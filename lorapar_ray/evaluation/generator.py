"""Greedy answers with transformers' `generate`, in a Ray actor, for adapters that vLLM does not serve.

vLLM serves LoRA only. A learnt prompt or prefix changes what the model reads, not its weights, so it cannot be merged
either. Slower than an engine by several times, and the same question gets the same answer up to rounding.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from lorapar_ray.config import ModelConfig, Resources
from lorapar_ray.datasets.chat import load_encoder
from lorapar_ray.models import resolve_model
from lorapar_ray.storage.cache import on_this_machine
from lorapar_ray.workers import ray_options, worker_environment


class Generator:
    """The base, with or without a PEFT adapter of any kind."""

    def __init__(self, model: dict[str, Any], base: str) -> None:
        self._settings = ModelConfig.model_validate(model)
        self._base = base
        self._model: Any = None
        self._ends: list[int] = []
        self._pad: int = 0

    def load(self, adapter: str | None) -> None:
        """Answer with `adapter`, a folder as PEFT saves it, here or in an object store, from now on; None: the base."""
        from peft import PeftModel
        from transformers import GenerationConfig

        from lorapar_ray.student import free_model_memory, load_base

        self._model = None  # two models may not fit
        free_model_memory()
        base = load_base(self._settings, self._base)
        base.generation_config = GenerationConfig()  # as for an engine: no penalties or bounds of the model's own
        encoder = load_encoder(resolve_model(self._base), None, self._settings.trust_remote_code)
        self._ends = encoder.end_ids
        self._pad = encoder.end_id if encoder.tokenizer.pad_token_id is None else encoder.tokenizer.pad_token_id
        self._model = (
            base if adapter is None else PeftModel.from_pretrained(base, str(on_this_machine(adapter)))
        ).eval()

    def greedy(self, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        """The most likely continuation of each prompt, token ids up to and with the first end token.

        It stops at every end token that an engine stops at (`Encoder.end_ids`).

        Prompts of one length are answered together, without padding: PEFT puts learnt prompts before the padding and
            counts padding as positions, which changes the answers.
        """
        import torch

        device = next(self._model.parameters()).device
        answers: dict[int, list[int]] = {}
        for rows in same_length(prompts, len(prompts)):
            ids = torch.tensor([prompts[row] for row in rows], device=device)
            with torch.no_grad():
                out = self._model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    eos_token_id=self._ends,
                    pad_token_id=self._pad,
                )
            for row, tokens in zip(rows, out[:, ids.shape[1] :].tolist(), strict=True):
                answers[row] = _answer(tokens, set(self._ends))
        return [answers[row] for row in range(len(prompts))]


def same_length(prompts: Sequence[Sequence[int]], most: int) -> Iterator[list[int]]:
    """Positions of prompts in groups of one length and at most `most` members, shortest first."""
    groups: dict[int, list[int]] = defaultdict(list)
    for row, prompt in enumerate(prompts):
        groups[len(prompt)].append(row)
    for _, rows in sorted(groups.items()):
        yield from (rows[start : start + most] for start in range(0, len(rows), most))


def start_generator(model: ModelConfig, base: str, resources: Resources) -> Any:
    """Create the actor (its model is loaded by `load`)."""
    import ray

    actor = ray.remote(Generator).options(
        **ray_options(resources), runtime_env={"env_vars": worker_environment(resources)}
    )
    return actor.remote(model.model_dump(mode="json"), base)


def _answer(ids: list[int], ends: set[int]) -> list[int]:
    return ids[: 1 + next((place for place, token in enumerate(ids) if token in ends), len(ids))]
