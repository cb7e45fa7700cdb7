"""The proof of the served policy as a part of its own: for a plain `vllm.LLM` and any PEFT model, without Ray.

A trainer that samples from another engine than it trains trusts that the engine serves its policy. `PolicyProof` loads
the policy and verifies it, as stage 2 does after each step:

- every rank's digest of the adapter that it read;
- what the model computes with: weights, or LoRA tensors, read back and compared with base + s·BA;
- log-probabilities of canary tokens, against the trainer's own;
- decoding after a cached prompt, against the same computation without the cache.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorapar_ray.adapters.keys import adapter_parameters
from lorapar_ray.adapters.store import CONFIG, WEIGHTS, save_adapter
from lorapar_ray.engines.adapter_files import AdapterFiles
from lorapar_ray.engines.canaries import Canary, canary_tolerance, gaps_between, mean_gap, refusal
from lorapar_ray.engines.mismatch import PolicyMismatch, verified
from lorapar_ray.engines.scoring import DECODING, sampled_logprobs, sampling_params, scored, scoring_params
from lorapar_ray.errors import UserError
from lorapar_ray.logprobs import token_logprobs

__all__ = ["PolicyMismatch", "PolicyProof", "Proof", "proof_arguments"]

LEAST = {torch.float32: 0.01}
"""Nats; the smallest measured tolerance by the engine's dtype."""
LEAST_OTHERWISE = 0.2


def proof_arguments(max_lora_rank: int | None = None, **settings: Any) -> dict[str, Any]:
    """Keyword arguments of `vllm.LLM` for a `PolicyProof`.

    Args:
        max_lora_rank: serve policies as LoRA adapters of up to this rank (on GPUs faster than merging); None: merge
            them into the model's weights.
        settings: your own arguments, which take precedence.
    """
    from lorapar_ray.engines.settings import LOADER, lora_arguments, platform_arguments

    lora = {} if max_lora_rank is None else lora_arguments(max_lora_rank, adapters=2)
    sampled = {"logprobs_mode": "processed_logprobs", "generation_config": "vllm", "enable_prefix_caching": True}
    return {**platform_arguments(), **sampled, **lora, "worker_extension_cls": LOADER, **settings}


@dataclass(frozen=True)
class Proof:
    """A policy that an engine was verified to serve."""

    number: int
    """How many policies it has been sent before."""
    digest: str
    """SHA-256 of the adapter file that every rank compared with its model."""
    gap: float
    """The largest gap of log-probabilities, in nats."""
    tolerance: float
    """The largest gap that would have passed."""


class PolicyProof:
    """Serves the policies of a trainer on a `vllm.LLM`, and verifies each of them; used by one thread."""

    def __init__(self, llm: Any, canaries: Sequence[Sequence[int]], *, tolerance: float | None = None) -> None:
        """Prepare the engine.

        Args:
            llm: a `vllm.LLM` with `proof_arguments`.
            canaries: token ids, a few dozen in each; the second half of each is scored. Tokens of real prompts and
                answers are best, and so few that one batch holds them.
            tolerance: the largest gap, in nats; None: eight times the gap on the base without an adapter, measured
                with a PEFT model before the first policy, and at least 0.01 in float32 and 0.2 in bfloat16.

        Raises:
            UserError: the engine was made without `proof_arguments`, or a canary has fewer than two tokens.
        """
        settings = llm.llm_engine.vllm_config
        if not settings.parallel_config.worker_extension_cls:
            raise UserError("the engine cannot read its weights back; make it with LLM(model, **proof_arguments())")
        if not canaries or min(map(len, canaries)) < 2:
            raise UserError("canaries: give at least one, each of two tokens or more")
        self.llm, self._tokens, self._tolerance = llm, [list(tokens) for tokens in canaries], tolerance
        self._least = LEAST.get(settings.model_config.dtype, LEAST_OTHERWISE)
        self._merges = settings.lora_config is None
        self._files = AdapterFiles()
        self._sent = 0
        self._digest = "base"
        self._lora: Any = None
        llm.collective_rpc("lorapar_prepare")

    def serve(self, policy: Any, canaries: Sequence[Canary] = ()) -> Proof:
        """Load a policy, and verify that the engine serves it.

        Args:
            policy: a PEFT model with a LoRA adapter, or an adapter directory.
            canaries: of a directory: tokens with the trainer's own log-probabilities; without any, no gap to the
                trainer is measured. A PEFT model computes its own.

        Raises:
            PolicyMismatch: the engine does not serve it.
        """
        model = None if isinstance(policy, str | Path) else policy
        if model is not None:
            self._measure_tolerance(model)
            canaries = self.canaries_of(model)
        number, self._sent = self._sent, self._sent + 1
        folder = self._folder_of(policy)
        try:
            claimed = self._load(folder, number)
            self.llm.reset_prefix_cache()
            self._digest = verified(claimed, self._check(folder))
        except PolicyMismatch as error:
            raise PolicyMismatch(f"the engine does not serve policy {number}: {error}") from error
        finally:
            if self._merges:
                shutil.rmtree(folder, ignore_errors=True)
        return self._proved(number, canaries)

    def check(self, model: Any) -> Proof:
        """Verify by log-probabilities alone that the engine still serves the policy of `model`, a PEFT model."""
        self._measure_tolerance(model)
        return self._proved(self._sent - 1, self.canaries_of(model))

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Any) -> list[Any]:
        """`LLM.generate` of token ids under the served policy; prefix cache entries of another policy are not used."""
        asked = [{"prompt_token_ids": list(prompt), "cache_salt": self._digest} for prompt in prompts]
        answers: list[Any] = self.llm.generate(asked, sampling, use_tqdm=False, lora_request=self._lora)
        return answers

    @torch.no_grad()
    def canaries_of(self, model: Any) -> list[Canary]:
        """The canary tokens with a model's own log-probabilities of their second halves."""
        training = model.training
        model.eval()
        found = []
        for tokens in self._tokens:
            start = len(tokens) // 2
            ids = torch.tensor([tokens], device=next(model.parameters()).device)
            logprobs, _ = token_logprobs(model(input_ids=ids).logits[:, start - 1 : -1].float(), ids[:, start:])
            found.append(Canary(tokens, start, logprobs[0].tolist()))
        model.train(training)
        return found

    def close(self) -> None:
        """Remove the adapters' files; the engine stays."""
        self._files.close()

    def _folder_of(self, policy: Any) -> Path:
        """A copy of the adapter that no one else changes."""
        if isinstance(policy, str | Path):
            blob, config = (Path(policy) / WEIGHTS).read_bytes(), (Path(policy) / CONFIG).read_text(encoding="utf-8")
            return self._files.write(blob, config)
        folder = self._files.folder(sum(each.numel() * 4 for each in adapter_parameters(policy).values()))
        save_adapter(policy, folder)
        return folder

    def _load(self, folder: Path, number: int) -> list[str]:
        """The digests of what the ranks read; of a LoRA they are known from `_check`."""
        if self._merges:
            digests: list[str] = self.llm.collective_rpc("lorapar_load_policy", args=(str(folder),))
            return digests
        from vllm.lora.request import LoRARequest

        before, self._lora = self._lora, LoRARequest(f"policy-{number}", number + 1, str(folder))
        self.llm.llm_engine.add_lora(self._lora)
        if before is not None:
            self.llm.llm_engine.remove_lora(before.lora_int_id)
            shutil.rmtree(before.lora_path, ignore_errors=True)
        return []

    def _check(self, folder: Path) -> list[tuple[str, str]]:
        if self._merges:
            return list(self.llm.collective_rpc("lorapar_check_merged", args=(str(folder),)))
        return list(self.llm.collective_rpc("lorapar_check_adapter", args=(self._lora.lora_int_id, str(folder))))

    def _measure_tolerance(self, model: Any) -> None:
        """On the base without an adapter, before the first policy: later the gap would include that policy's effect."""
        if self._tolerance is None and self._sent == 0:
            with model.disable_adapter():
                base = self.canaries_of(model)
            gap = max(self._gaps(base).values())
            self._tolerance = canary_tolerance(gap, self._least, "check model and dtype of both, or give `tolerance`")

    def _gaps(self, canaries: Sequence[Canary]) -> dict[str, float]:
        answers = self.generate([canary.token_ids for canary in canaries], scoring_params()) if canaries else []
        scores = [
            scored(answer, canary.token_ids, canary.start) for answer, canary in zip(answers, canaries, strict=True)
        ]
        prompt = self._tokens[0]
        [decoded] = self.generate([prompt], sampling_params(DECODING))
        choice = decoded.outputs[0]
        tokens = [*prompt, *choice.token_ids]
        [afresh] = self.generate([tokens], scoring_params())
        cached = mean_gap(sampled_logprobs(choice), scored(afresh, tokens, len(prompt)))
        return gaps_between(canaries, scores, [cached])

    def _proved(self, number: int, canaries: Sequence[Canary]) -> Proof:
        gaps, tolerance = self._gaps(canaries), self._least if self._tolerance is None else self._tolerance
        if why := refusal(gaps, tolerance):
            raise PolicyMismatch(f"the engine does not serve policy {number}: {why} (tolerance {tolerance:.3g})")
        return Proof(number, self._digest, max(gaps.values()), tolerance)
