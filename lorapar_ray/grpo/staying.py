"""Which rollout engines stay for the evaluation after stage 2."""

from __future__ import annotations

from typing import Any

from lorapar_ray.capacity import capacity
from lorapar_ray.config import Config
from lorapar_ray.engines.answering import AnsweringEngine
from lorapar_ray.engines.kept import kept_engines
from lorapar_ray.engines.settings import same_engine
from lorapar_ray.gpus import place, sync_of
from lorapar_ray.grpo.sampler import new_engine
from lorapar_ray.models import model_reference


def staying_engines(config: Config, plan: dict[str, Any]) -> list[Any]:
    """Stage 2's engines, created and kept here, if the evaluation right after it asks for the same ones; else none.

    They are kept from the start, so that they also end if the stage fails. Only on one machine: they belong to no
    placement group, which would end with the stage.

    Args:
        plan: the coordinator's.
    """
    import ray

    grpo, then = config.grpo, place(config, "evaluate", int(capacity().largest("GPU"))).evaluate
    same = (
        sync_of(grpo) == "merged"
        and then.serve != "adapter"
        and plan["model"] == model_reference(config.model.path)  # else a residual base
        and not grpo.top_k
        and grpo.max_learners is None  # which must see what the engines hold, from the beginning
        and grpo.rollout_actors == then.engines
        and same_engine(grpo.rollout_engine, grpo.rollout_resources, then.engine, then.resources)
    )
    if not same or not kept_engines().leads_to("grpo", "evaluate") or len(ray.nodes()) > 1:
        return []
    engines = [new_engine(plan, None, slot, AnsweringEngine) for slot in range(grpo.rollout_actors)]
    kept_engines().keep(engines)
    return engines
