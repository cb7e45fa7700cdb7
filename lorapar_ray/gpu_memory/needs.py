"""The GPU memory of each process of a stage: pure functions of a placed config and the student's size.

`parts` of a need are certain: weights, what the optimiser needs in any case, one example of the shortest kind. What
depends on the lengths of the rows, which nobody knows before they are labelled, or on the cut, is in `more`: what it
takes at most, in a pass full of the longest rows that the config allows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import ceil

from lorapar_ray.config import Config, EngineConfig, Resources, SftConfig
from lorapar_ray.engines.settings import GRAPHS, OUTSIDE_TORCH, filled_part, given_cache, lora_arguments
from lorapar_ray.gpu_memory.student import StudentSize
from lorapar_ray.gpus import sync_of
from lorapar_ray.importance.losses import SLICE as SCORED_LOGITS
from lorapar_ray.logprobs import SLICE
from lorapar_ray.sft.rows import bucket

BATCHED_TOKENS = 2048
"""Tokens of an engine's largest forward pass, vLLM's default."""
SCORED_TOKENS = 4096
"""`score.batch_tokens` on a GPU."""
SHORTEST = 2
"""Tokens of the shortest example there can be: one of a prompt and one of a response."""


@dataclass(frozen=True)
class Need:
    """The memory of processes of one kind."""

    process: str
    count: int
    share: float
    """Share of a GPU that Ray gives one of them; 1: the whole."""
    fills: float
    """Part of a GPU that one of them may fill: for an engine less than its share."""
    parts: Mapping[str, float]
    """Bytes by purpose, of what is certain."""
    more: Mapping[str, float] = field(default_factory=dict)
    """Bytes by purpose, of what comes on top of it at most."""

    @property
    def bytes(self) -> float:
        """Bytes that one process needs at least."""
        return sum(self.parts.values())

    @property
    def most(self) -> float:
        """Bytes that it needs in the fullest pass."""
        return self.bytes + sum(self.more.values())


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
    stored = _stored(size, size.kept, checkpointing=settings.gradient_checkpointing)
    if size.ends_with_head:  # a slice's logits are freed before the next one's: see `importance.losses`
        logits = (4.0 + 2 * size.logit) * min(size.vocabulary * tokens, SCORED_LOGITS["cuda"])
    else:
        logits = _stored_logits(size, tokens)
    parts = {
        **_weights(size, _shards(settings.sharding, settings.workers)),
        "adapter and sums": 12.0 * size.elements,  # of a part's examples, Σg and Σg²
        "shortest example": stored * SHORTEST,
    }
    more = {"activations": stored * (tokens - SHORTEST), "logits": logits}
    needs = [_need("worker", settings.workers, settings.resources, parts, more)]
    if config.warms_up:  # in the same processes, which free its memory before they score
        same = {name: getattr(settings, name) for name in ("workers", "resources", "sharding")}
        warm_up = config.sft.model_copy(update={**same, "masked": False})
        needs.insert(0, _training(config, warm_up, size, "warm-up worker"))
    return needs


def _sft(config: Config, size: StudentSize) -> list[Need]:
    return [_training(config, config.sft, size, "worker")]


def _training(config: Config, settings: SftConfig, size: StudentSize, process: str) -> Need:
    """Of stage 1, or the warm-up. Rows are padded to the micro-batch's longest, with graphs to a bucket; only
    response tokens reach the head."""
    graphs = _graphs(config, settings)
    longest = bucket(settings.max_length, 4) if graphs else settings.max_length
    tokens, losses = settings.micro_batch_size * longest, settings.micro_batch_size * settings.max_length
    stored = _stored(size, size.kept_with_dropout, checkpointing=settings.gradient_checkpointing)
    logits = _stored_logits(size, bucket(losses, 1) if graphs else losses)
    moments = _moments(size, masked=settings.masked)
    parts = {
        **_weights(size, _shards(settings.sharding, settings.workers)),
        "adapter and gradients": 8.0 * size.elements,
        **({} if settings.masked else moments),
        "shortest example": stored * SHORTEST,
    }
    more = {**(moments if settings.masked else {}), "activations": stored * (tokens - SHORTEST), "logits": logits}
    if graphs:  # those of the graphs' pool, and those of a shape's first passes; short of them, graphs go
        more["CUDA graphs"] = stored * tokens + logits + 4.0 * size.elements
    return _need(process, settings.workers, settings.resources, parts, more)


def _graphs(config: Config, settings: SftConfig) -> bool:
    """Whether stage 1 captures CUDA graphs: see `sft.worker.passes_of`."""
    eager = settings.gradient_checkpointing or settings.sharding != "none" or config.model.quantization is not None
    return not eager and settings.acceleration != "none"


def _grpo(config: Config, size: StudentSize) -> list[Need]:
    """A learner's pass fills the free memory. It holds at least one sample, or its part of one that learners share;
    layers are checkpointed if needed."""
    settings = config.grpo
    longest = ceil((settings.max_prompt_length + settings.max_completion_length) / settings.sequence_parallel)
    shortest = ceil(SHORTEST / settings.sequence_parallel)
    stored = _stored(size, size.kept, checkpointing=settings.gradient_checkpointing is not False)
    moments = _moments(size, masked=settings.masked)
    parts = {
        **_weights(size, _shards(settings.sharding, settings.learners)),
        "adapter and gradients": 12.0 * size.elements,  # and stage 1's values, for the KL divergence
        **({} if settings.masked else moments),
        "shortest example": stored * shortest,
    }
    more = {
        **(moments if settings.masked else {}),
        "activations": stored * max(0, longest - shortest),
        "logits": _stored_logits(size, longest) if size.stores_logits else 2.0 * 4 * SLICE["cuda"],
    }
    merged = sync_of(settings) == "merged"
    adapters = 0.0 if merged else _adapters(config, size, settings.policies_in_use)
    engine, resources = settings.rollout_engine, settings.rollout_resources
    return [
        _engine("rollout engine", settings.rollout_actors, engine, resources, size, merged=merged, adapters=adapters),
        _need("learner", settings.learners, settings.learner_resources, parts, more),
    ]


def _evaluate(config: Config, size: StudentSize) -> list[Need]:
    settings = config.evaluate
    merged = settings.serve == "merged"
    return [_engine("engine", settings.engines, settings.engine, settings.resources, size, merged=merged)]


def _shards(sharding: str, workers: int) -> int:
    """The most parts into which the base is cut (`hsdp`: with all workers on one node)."""
    return 1 if sharding == "none" else workers


_NEEDS: dict[str, Callable[[Config, StudentSize], list[Need]]] = {
    "score": _score,
    "sft": _sft,
    "grpo": _grpo,
    "evaluate": _evaluate,
}


def _need(
    process: str, count: int, resources: Resources, parts: Mapping[str, float], more: Mapping[str, float]
) -> Need:
    """Of a process that computes with torch; what CUDA itself takes differs between GPUs."""
    share = _share(resources)
    return Need(process, count, share, share, parts, {**more, "CUDA itself": float(OUTSIDE_TORCH)})


def _share(resources: Resources) -> float:
    return min(1.0, resources.gpu_count)


def _weights(size: StudentSize, ranks: int) -> dict[str, float]:
    """The frozen base; sharded, a part of it, and gathered whole: two layers, one of them ahead, and what is outside of
    the layers, from the forward pass's beginning to the backward pass's end."""
    return {"base": size.base if ranks == 1 else size.base / ranks + size.outside + 2 * size.largest_layer}


def _moments(size: StudentSize, *, masked: bool) -> dict[str, float]:
    """Two of each active element; under a mask also its position, and the cut says how many are active."""
    return {"moments": (12.0 if masked else 8.0) * size.elements}


def _stored(size: StudentSize, kept: float, *, checkpointing: bool) -> float:
    """Bytes of activations per token."""
    return size.checkpointed + size.recomputed if checkpointing else kept


def _stored_logits(size: StudentSize, tokens: int) -> float:
    """In the model's dtype with their gradient, and a slice in float32 with its weights (see `logprobs`)."""
    logits = size.vocabulary * tokens
    return 2.0 * size.logit * logits + 2.0 * 4 * min(logits, SLICE["cuda"])


def _adapters(config: Config, size: StudentSize, count: int) -> float:
    """vLLM's slots for `count` adapters: in 16 bits, of a rank that it supports, for at least the adapted modules."""
    rank: int = lora_arguments(config.adapter.rank, count)["max_lora_rank"]
    return 2.0 * count * size.elements * rank / config.adapter.rank / config.grpo.rollout_engine.tensor_parallel


def _engine(
    process: str,
    count: int,
    engine: EngineConfig,
    resources: Resources,
    size: StudentSize,
    *,
    merged: bool,
    adapters: float = 0.0,
) -> Need:
    """At least a cache for one sequence of `max_model_len`; the cache then fills the engine's part of the GPU.

    Args:
        adapters: bytes for the LoRA adapters that it serves.
    """
    ranks = engine.tensor_parallel
    cache, given = size.cache * engine.max_model_len / ranks, given_cache(engine)
    parts = {
        "weights": size.served / ranks,
        **({"cache of one sequence": cache} if given is None else {"cache": float(given)}),
        "largest pass": 2.0 * size.recomputed * BATCHED_TOKENS / ranks + 4.0 * size.vocabulary * engine.max_num_seqs,
    }
    if adapters:
        parts["adapters"] = adapters
    if merged:
        parts["a layer to merge"] = 4.0 * size.largest_layer
    if not engine.enforce_eager:
        parts["CUDA graphs"] = float(GRAPHS)
    parts["CUDA itself"] = float(OUTSIDE_TORCH)
    return Need(process, count, _share(resources), filled_part(engine, resources), parts)
