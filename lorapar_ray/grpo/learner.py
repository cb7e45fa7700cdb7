"""The policy that one rank trains: model, adapter and optimiser, its steps and its versions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from lorapar_ray.boundary import boundary
from lorapar_ray.config import GrpoConfig, ModelConfig
from lorapar_ray.engines.policy import Policy, PolicySender
from lorapar_ray.grpo import checkpoint
from lorapar_ray.grpo.canaries import Canary
from lorapar_ray.grpo.figures import step_metrics
from lorapar_ray.grpo.forward import Forward
from lorapar_ray.grpo.samples import MiniBatch, Sample
from lorapar_ray.grpo.update import Updates, assign
from lorapar_ray.grpo.worker import GrpoJob
from lorapar_ray.models import resolve_model
from lorapar_ray.network import COLLECTIVE_LIMIT_S
from lorapar_ray.optim.schedule import learning_rate_factor
from lorapar_ray.precision import rounding, use_tensor_cores
from lorapar_ray.sequence_parallel import sequence_group
from lorapar_ray.tensortree import OTHERS


class Learner:
    """The policy being trained on one rank."""

    def __init__(self, job: GrpoJob) -> None:
        from lorapar_ray.adapters import adapter_parameters
        from lorapar_ray.datasets.chat import load_encoder
        from lorapar_ray.optim import MaskedAdamW, masked_param_groups
        from lorapar_ray.partition import load_regions, stage_mask
        from lorapar_ray.sharding import load_student

        self.job = job
        self.settings = settings = GrpoConfig.model_validate(job.settings)
        model = ModelConfig.model_validate(job.model)
        torch.manual_seed(job.seed)
        self.model = load_student(model, job.base, Path(job.adapter_in), settings.sharding)
        self.model.eval()  # no dropout: the learner's policy is the one that was sampled from
        self.parameters = adapter_parameters(self.model)
        masks = (
            {key: torch.ones_like(parameter, dtype=torch.bool) for key, parameter in self.parameters.items()}
            if job.regions is None
            else stage_mask(load_regions(Path(job.regions))[0], stage=2)
        )
        config = (Path(job.adapter_in) / "adapter_config.json").read_text()
        self.sender = PolicySender(config, None if job.regions is None else masks)
        self.optimizer = MaskedAdamW(
            masked_param_groups(self.parameters, masks, lr=settings.learning_rate, weight_decay=settings.weight_decay),
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
        )
        on = next(iter(self.parameters.values())).device
        use_tensor_cores(on, self.model.dtype)
        self._encoder = load_encoder(resolve_model(job.base), None, model.trust_remote_code)
        self.forward = Forward(
            self.model,
            settings,
            pad_id=self._encoder.tokenizer.pad_token_id,
            filler=_canary_sample(*job.canaries[0]),
            sharded=settings.sharding != "none",
            device=on,
            sequence=sequence_group(settings.sequence_parallel, COLLECTIVE_LIMIT_S),
        )
        self.updates = Updates(self.forward, self.parameters, self.optimizer, settings)

    @property
    def rounding(self) -> float:
        """Nats by which rounding in the model's dtype may move a log-probability."""
        return rounding(self.model.dtype)

    def step(
        self,
        mini_batches: Sequence[MiniBatch],
        step: int,
        world: int,
        before_update: Callable[[], None] | None = None,
    ) -> dict[str, float]:
        """The updates on this rank's share of a batch; returns their metrics. An empty batch changes nothing.

        Args:
            mini_batches: one update each; with `updates_per_batch` they are repeated.
            before_update: called once, when the first update's gradient is ready; also for an empty batch.

        Raises:
            UserError: `nonfinite_limit` updates in a row had a loss or gradient that is not finite.
        """
        settings = self.settings
        rate = settings.learning_rate * learning_rate_factor(
            step, self.job.steps, warmup_ratio=settings.warmup_ratio, kind=settings.schedule
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if not mini_batches:
            if before_update is not None:
                before_update()
            return {"learning_rate": rate, "loss": 0.0, "grad_norm": 0.0}
        count = settings.updates_per_batch or len(mini_batches)
        updates = [mini_batches[number % len(mini_batches)] for number in range(count)]
        old = self.updates.old_logprobs(updates)
        found = [(self.updates.take(updates[0], old, world, before_update), updates[0].count)]
        found += [(self.updates.take(mini_batch, old, world), mini_batch.count) for mini_batch in updates[1:]]
        return {**step_metrics(found), "learning_rate": rate, "updates": float(len(updates))}

    def text(self, token_ids: list[int], to_the_end: bool = True) -> str:
        """A completion as text, up to its end or the first stop string; or the whole, with its special tokens."""
        if to_the_end:
            return self._encoder.answer_text(token_ids, self.settings.stop)
        whole: str = self._encoder.tokenizer.decode(token_ids)
        return whole

    @torch.no_grad()
    def canaries(self) -> list[Canary]:
        """The canary tokens with this policy's log-probabilities at temperature 1, as engines score prompts."""
        samples = [_canary_sample(token_ids, start) for token_ids, start in self.job.canaries]
        logprobs_BT, _ = self.forward.logprobs(self.forward.rows([[sample] for sample in samples]), temperature=1.0)
        return [
            Canary(token_ids, start, found[: len(token_ids) - start].tolist())
            for (token_ids, start), found in zip(self.job.canaries, logprobs_BT, strict=True)
        ]

    def base_canaries(self) -> list[Canary]:
        """The same for the base without an adapter, which engines serve before the first policy."""
        with self.model.disable_adapter():
            return self.canaries()

    def policy(self, version: int) -> Policy:
        """The current adapter as a message: complete the first time, then only elements that may have changed."""
        return self.sender.policy(version, self.parameters)

    def save(self, step: int, stream: dict[str, Any]) -> None:
        """Checkpoint after `step` steps, with the state of the prompt stream."""
        tree = {
            "stream": stream,
            "parameters": {key: parameter.detach() for key, parameter in self.parameters.items()},
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
        }
        checkpoint.save(Path(self.job.checkpoints), step, tree)

    def restore(self, rank: int, world: int) -> tuple[int, dict[str, Any] | None]:
        """Load the newest checkpoint; returns (steps done, prompt stream state).

        Raises:
            UserError: it is damaged although its length is right.
        """
        folder = Path(self.job.checkpoints)
        tree = checkpoint.newest(folder, rank, world)
        if tree is None:
            return 0, None
        with boundary(f"grpo: the newest checkpoint in '{folder}' is damaged", OTHERS):
            assign(self.parameters, tree["parameters"])
            self.optimizer.load_state_dict(tree["optimizer"])
            torch.set_rng_state(tree["rng"])
            return int(tree["step"]), tree["stream"]

    def finish(self) -> None:
        """Write the trained adapter."""
        from lorapar_ray.adapters import save_adapter

        save_adapter(self.model, Path(self.job.adapter_out))


def _canary_sample(token_ids: list[int], start: int) -> Sample:
    own = token_ids[start:]
    return Sample(token_ids[:start], own, [0.0] * len(own), 0.0, finished=True, version=0)
