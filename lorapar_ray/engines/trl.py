"""TRL's GRPOTrainer with rollouts from an engine whose policy is verified after every optimiser step.

TRL's own vLLM modes load weights without a check. Here the engine is a `vllm.LLM` that you make, also on a CPU:

    proof = PolicyProof(LLM(model, **proof_arguments()), canaries)
    callback = ServePolicy(proof)
    GRPOTrainer(…, peft_config=LoraConfig(…), rollout_func=callback.rollout, callbacks=[callback])
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from lorapar_ray.engines.proof import PolicyProof, Proof
from lorapar_ray.engines.scoring import sampled_logprobs, sampling_params


class ServePolicy(TrainerCallback):
    """Serves the trainer's policy before the first and after every optimiser step; a mismatch stops the training."""

    def __init__(self, proof: PolicyProof) -> None:
        self._proof = proof
        self.proofs: list[Proof] = []
        """Of every policy so far."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._serve(kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._serve(kwargs["model"])

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Adds `policy_gap`, in nats, to what the trainer prints and keeps in `state.log_history`."""
        for line in (logs, *state.log_history[-1:]):
            if line is not None and self.proofs:
                line["policy_gap"] = self.proofs[-1].gap

    def _serve(self, model: Any) -> None:
        self.proofs.append(self._proof.serve(model))

    def rollout(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """The trainer's `rollout_func`: one completion for each prompt, under the served policy.

        Chat template, tools and sampling are those of the trainer, as in TRL's own generation.
        """
        settings = trainer.args
        prompt_ids = [_prompt_ids(prompt, trainer) for prompt in prompts]
        sampling = {
            "max_tokens": settings.max_completion_length,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "top_k": settings.top_k or -1,
            "min_p": settings.min_p or 0.0,
            "repetition_penalty": settings.repetition_penalty,
            **(settings.generation_kwargs or {}),
        }
        answers = self._proof.generate(prompt_ids, sampling_params(sampling))
        choices = [answer.outputs[0] for answer in answers]
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": [list(choice.token_ids) for choice in choices],
            "logprobs": [sampled_logprobs(choice) for choice in choices],
        }


def _prompt_ids(prompt: Any, trainer: Any) -> list[int]:
    tokenizer = trainer.processing_class
    if isinstance(prompt, str):
        found = tokenizer(prompt)
    else:
        found = tokenizer.apply_chat_template(
            prompt,
            tools=getattr(trainer, "tools", None) or None,  # earlier TRL has neither
            chat_template=getattr(trainer, "chat_template", None),
            add_generation_prompt=True,
            return_dict=True,
            **trainer.chat_template_kwargs,
        )
    ids: list[int] = found["input_ids"]
    return ids
