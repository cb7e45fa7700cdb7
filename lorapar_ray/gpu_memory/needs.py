"""The smallest GPU memory of each process of a stage: pure functions of a placed config and the student's size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil

from lorapar_ray.config import Config, EngineConfig, Resources
from lorapar_ray.engines.settings import GRAPHS, OUTSIDE_TORCH
from lorapar_ray.gpu_memory.student import StudentSize
from lorapar_ray.gpus import sync_of
from lorapar_ray.logprobs import SLICE

BATCHED_TOKENS = 2048
"""Tokens of an engine's largest forward pass, vLLM's default."""
SCORED_TOKENS = 4096
"""`score.batch_tokens` on a GPU."""


@dataclass(frozen=True)
class Need:
    """The memory of processes of one kind."""

    process: str
    count: int
    share: float
    """Share of a GPU that one of them may fill; 1: the whole."""
    parts: Mapping[str, float]
    """Bytes by purpose."""

    @property
    def bytes(self) -> float:
        """Bytes of one process."""
        return sum(self.parts.values())


def needs_of(config: Config, stage: str, size: StudentSize) -> list[Need]:
    """The memory of the stage's processes on GPUs; without teachers of other models and processes on CPUs.

    Args:
        config: with numbers instead of `gpus: auto` (`gpus.place`).
    """
    found = _NEEDS[stage](config, size) if stage in _NEEDS else []
    return [need for need in found if need.share > 0]


def _score(config: Config, size: StudentSize) -> list[Need]:
    settings = config.score
    tokens = max(settings.max_length, settings.batch_tokens or SCORED_TOKENS)
    parts = {
        **_weights(size, _shards(settings.sharding, settings.workers)),
        "sums": 4.0 * size.elements * (1 + 2 * 2),  # the parameters; of both Systems, Σg and Σg²
        **_activations(size, size.kept, tokens, checkpointing=settings.gradient_checkpointing),
        **_logits(size, tokens),
    }
    return [_need("worker", settings.workers, settings.resources, parts)]


def _sft(config: Config, size: StudentSize) -> list[Need]:
    settings = config.sft
    tokens = settings.micro_batch_size * settings.max_length
    parts = {
        **_weights(size, _shards(settings.sharding, settings.workers)),
        "adapter and moments": 16.0 * size.elements,
        **_activations(size, size.kept_with_dropout, tokens, checkpointing=settings.gradient_checkpointing),
        **_logits(size, tokens),
    }
    return [_need("worker", settings.workers, settings.resources, parts)]


def _grpo(config: Config, size: StudentSize) -> list[Need]:
    """A learner's pass fills the free memory. It holds at least one sample, or its part of one that learners share;
    layers are checkpointed if needed."""
    settings = config.grpo
    longest = ceil((settings.max_prompt_length + settings.max_completion_length) / settings.sequence_parallel)
    parts = {
        **_weights(size, _shards(settings.sharding, settings.learners)),
        "adapter and moments": 20.0 * size.elements,  # and stage 1's values, for the KL divergence
        **_activations(size, size.kept, longest, checkpointing=settings.gradient_checkpointing is not False),
        "logits": 2.0 * 4 * SLICE["cuda"],
    }
    merged = sync_of(settings) == "merged"
    engine = _engine(settings.rollout_engine, settings.rollout_resources, size, merged=merged)
    return [
        _need("rollout engine", settings.rollout_actors, settings.rollout_resources, engine),
        _need("learner", settings.learners, settings.learner_resources, parts),
    ]


def _evaluate(config: Config, size: StudentSize) -> list[Need]:
    settings = config.evaluate
    parts = _engine(settings.engine, settings.resources, size, merged=settings.serve == "merged")
    return [_need("engine", settings.engines, settings.resources, parts)]


def _shards(sharding: str, workers: int) -> int:
    """The most parts into which the base is cut (`hsdp`: with all workers on one node)."""
    return 1 if sharding == "none" else workers


_NEEDS: dict[str, Callable[[Config, StudentSize], list[Need]]] = {
    "score": _score,
    "sft": _sft,
    "grpo": _grpo,
    "evaluate": _evaluate,
}


def _need(process: str, count: int, resources: Resources, parts: Mapping[str, float]) -> Need:
    return Need(process, count, min(1.0, resources.gpu_count), {**parts, "CUDA itself": float(OUTSIDE_TORCH)})


def _weights(size: StudentSize, ranks: int) -> dict[str, float]:
    """The frozen base; sharded, a part of it and two layers gathered whole, one of them ahead."""
    return {"base": size.base if ranks == 1 else size.base / ranks + 2 * size.largest_layer}


def _activations(size: StudentSize, kept: float, tokens: int, *, checkpointing: bool) -> dict[str, float]:
    per_token = size.checkpointed + size.recomputed if checkpointing else kept
    return {"activations": per_token * tokens}


def _logits(size: StudentSize, tokens: int) -> dict[str, float]:
    """In the model's dtype with their gradient, and a slice in float32 with its weights (see `logprobs`)."""
    return {"logits": 2.0 * 2 * size.vocabulary * tokens + 2.0 * 4 * SLICE["cuda"]}


def _engine(engine: EngineConfig, resources: Resources, size: StudentSize, *, merged: bool) -> dict[str, float]:
    """At least a cache for one sequence of `max_model_len`; the cache then fills the engine's part of the GPU."""
    ranks = engine.tensor_parallel
    parts = {
        "weights": size.served / ranks,
        "cache of one sequence": size.cache * engine.max_model_len / ranks,
        "largest pass": 2.0 * size.recomputed * BATCHED_TOKENS / ranks + 4.0 * size.vocabulary * engine.max_num_seqs,
    }
    if merged:
        parts["a layer to merge"] = 4.0 * size.largest_layer
    if not engine.enforce_eager:
        parts["CUDA graphs"] = float(GRAPHS)
    return parts
