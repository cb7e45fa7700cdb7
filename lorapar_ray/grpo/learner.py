"""What one rank computes in stage 2: forward passes, updates and canaries, of one policy or of several.

Several runs with equal base and shapes share the frozen base: their adapters are stacked, and a pass holds samples of
all of them (see `adapters.many`). Each arm keeps its own optimiser, versions and checkpoints (`arm.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorapar_ray.config import GrpoConfig, ModelConfig
from lorapar_ray.engines.canaries import Canary
from lorapar_ray.grpo.arm import Arm
from lorapar_ray.grpo.figures import Part, step_metrics
from lorapar_ray.grpo.forward import Forward
from lorapar_ray.grpo.samples import MiniBatch, Sample
from lorapar_ray.grpo.update import Updates
from lorapar_ray.grpo.worker import GrpoJob
from lorapar_ray.models import resolve_model
from lorapar_ray.network import COLLECTIVE_LIMIT_S
from lorapar_ray.precision import rounding, use_tensor_cores
from lorapar_ray.sequence_parallel import sequence_group


class Learner:
    """The policies being trained on one rank."""

    def __init__(self, jobs: Sequence[GrpoJob]) -> None:
        """Load the base and the adapters.

        Args:
            jobs: of one run, or of several that may train together (see `together.shape_of`).
        """
        from lorapar_ray.datasets.chat import load_encoder

        self._jobs, job = jobs, jobs[0]
        settings = GrpoConfig.model_validate(job.settings)
        model = ModelConfig.model_validate(job.model)
        torch.manual_seed(job.seed)
        self.model, trained, parameters = _one(job, model, settings) if len(jobs) == 1 else _many(jobs, model)
        self.model.eval()  # no dropout: the learner's policy is the one that was sampled from
        self.arms = [_arm(each, own) for each, own in zip(jobs, parameters, strict=True)]
        on = trained[0].device
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
            arms=len(jobs),
        )
        self.updates = Updates(self.forward, self.arms, trained)

    @property
    def rounding(self) -> float:
        """Nats by which rounding in the model's dtype may move a log-probability."""
        return rounding(self.model.dtype)

    def step(
        self,
        mini_batches: Mapping[int, Sequence[MiniBatch]],
        steps: Mapping[int, int],
        world: int,
        before_update: Callable[[int], None] | None = None,
    ) -> dict[int, dict[str, float]]:
        """The updates on this rank's shares of some arms' batches; returns their metrics. An empty batch changes
        nothing.

        Args:
            mini_batches: by arm, one update each; with `updates_per_batch` they are repeated.
            steps: the number of each arm's step.
            before_update: called once for each arm, when its first update's gradient is ready; also for an empty batch.
        """
        begun = {number: self.arms[number].begin(own, steps[number]) for number, own in mini_batches.items()}
        updates = {number: own for number, (own, _) in begun.items() if own}
        if before_update is not None:
            for number in begun.keys() - updates.keys():
                before_update(number)
        old = self.updates.old_logprobs(updates)
        found: dict[int, list[Part]] = {number: [] for number in updates}
        for at in range(max(map(len, updates.values()), default=0)):
            due = {number: own[at] for number, own in updates.items() if at < len(own)}
            taken = self.updates.take(due, old, world, None if at else before_update)
            for number, metrics in taken.items():
                found[number].append(Part(metrics, due[number].count, due[number].tokens))
        return {
            number: {**step_metrics(found[number]), "learning_rate": rate, "updates": float(len(own))}
            if own
            else {"learning_rate": rate, "loss": 0.0, "grad_norm": 0.0}
            for number, (own, rate) in begun.items()
        }

    def text(self, token_ids: list[int], to_the_end: bool = True) -> str:
        """A completion as text, up to its end or the first stop string; or the whole, with its special tokens."""
        if to_the_end:
            return self._encoder.answer_text(token_ids, self.arms[0].settings.stop)
        whole: str = self._encoder.tokenizer.decode(token_ids)
        return whole

    @torch.no_grad()
    def canaries(self) -> list[list[Canary]]:
        """Each arm's canary tokens with its policy's log-probabilities at temperature 1, as engines score prompts."""
        micro = {
            number: [[_canary_sample(token_ids, start)] for token_ids, start in job.canaries]
            for number, job in enumerate(self._jobs)
        }
        rows = self.forward.rows_of(micro)
        logprobs_BT, _ = self.forward.logprobs(rows.whole, temperature=1.0)
        return [
            [
                Canary(token_ids, start, found[: len(token_ids) - start].tolist())
                for (token_ids, start), found in zip(job.canaries, rows.of(number, logprobs_BT), strict=True)
            ]
            for number, job in enumerate(self._jobs)
        ]

    def base_canaries(self) -> list[list[Canary]]:
        """The same for the base without an adapter, which engines serve before the first policy."""
        with self.model.disable_adapter():
            return self.canaries()

    def finish(self, arm: int) -> None:
        """Write an arm's trained adapter."""
        from lorapar_ray.adapters import save_adapter
        from lorapar_ray.adapters.store import write_adapter_state
        from lorapar_ray.boundary import read_object

        job = self._jobs[arm]
        if len(self._jobs) == 1:
            save_adapter(self.model, Path(job.adapter_out))
        else:
            config = read_object(Path(job.adapter_in) / "adapter_config.json")
            write_adapter_state(Path(job.adapter_out), config, self.model.state_of(arm))


Loaded = tuple[Any, list[Tensor], list[Mapping[str, Any]]]
"""The model, the parameters that get gradients, and each arm's parameters by PEFT's saved keys."""


def _one(job: GrpoJob, model: ModelConfig, settings: GrpoConfig) -> Loaded:
    from lorapar_ray.adapters import adapter_parameters
    from lorapar_ray.sharding import load_student

    student = load_student(model, job.base, Path(job.adapter_in), settings.sharding)
    parameters = adapter_parameters(student)
    return student, list(parameters.values()), [parameters]


def _many(jobs: Sequence[GrpoJob], model: ModelConfig) -> Loaded:
    from lorapar_ray.adapters.many import load_many
    from lorapar_ray.student import device, load_base

    folders = [Path(job.adapter_in) for job in jobs]
    student = load_many(load_base(model, jobs[0].base), folders, dropout=0.0, device=device())
    for stack in student.stacks():
        stack.grad = torch.zeros_like(stack)
    student.share_gradients()
    return student, list(student.stacks()), [student.parameters_of(arm) for arm in range(len(jobs))]


def _arm(job: GrpoJob, parameters: Mapping[str, Any]) -> Arm:
    from lorapar_ray.partition import load_regions, stage_mask

    return Arm(
        parameters,
        GrpoConfig.model_validate(job.settings),
        steps=job.steps,
        masks=None if job.regions is None else stage_mask(load_regions(Path(job.regions))[0], stage=2),
        config=(Path(job.adapter_in) / "adapter_config.json").read_text(encoding="utf-8"),
        checkpoints=Path(job.checkpoints),
    )


def _canary_sample(token_ids: list[int], start: int) -> Sample:
    own = token_ids[start:]
    return Sample(token_ids[:start], own, [0.0] * len(own), 0.0, finished=True, version=0)
