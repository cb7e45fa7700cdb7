"""Stage 2 on Ray: rollout engines and rewards behind one coordinator, learners on Ray Train."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

from lorapar_ray.adapters import read_adapter_state
from lorapar_ray.adapters.export import export_plain
from lorapar_ray.boundary import read_object
from lorapar_ray.capacity import needing
from lorapar_ray.config import Config
from lorapar_ray.datasets.labelled import require_room, token_table
from lorapar_ray.datasets.tokens import Questions, Selection, TokenTable
from lorapar_ray.engines.kept import HandedEngines
from lorapar_ray.engines.policy_transport import require_nixl
from lorapar_ray.errors import UserError
from lorapar_ray.gpus import sync_of
from lorapar_ray.grpo.coordinator import Coordinator
from lorapar_ray.grpo.environments.registry import require_environment
from lorapar_ray.grpo.placement import reserved, without_a_bundle
from lorapar_ray.grpo.rewards.judge import judging
from lorapar_ray.grpo.rewards.registry import require_rewards
from lorapar_ray.grpo.sampler import new_engine
from lorapar_ray.grpo.shards import shard_count, too_few_shards
from lorapar_ray.grpo.stage import STAGE
from lorapar_ray.grpo.staying import staying_engines
from lorapar_ray.grpo.worker import GrpoJob, learn_worker
from lorapar_ray.mergeable import not_in_the_files, unmergeable
from lorapar_ray.progress import console, progress, training_progress
from lorapar_ray.room import Others
from lorapar_ray.runs import RunDirectory
from lorapar_ray.sft.job import residual
from lorapar_ray.student import base_reference, starting_adapter
from lorapar_ray.tracking import notices_of, require_trackers
from lorapar_ray.workers import RESTARTS, beside_the_driver, on_a_worker, run_workers, where_models_are

CANARIES = 4
CANARY_TOKENS = 48
"""Most tokens of a canary: more than one block of a prefix cache, and few beside those of a step."""
CANARY_CONTEXT = 16
"""Of them, the first ones, whose log-probabilities are not compared: with little context most policies agree."""
STOP_LIMIT_S = 30
ROOM_LIMIT_S = 60


@dataclass(frozen=True)
class Stage2:
    """Stage 2 of one run, ready to start."""

    config: Config
    run: RunDirectory
    job: GrpoJob
    plan: dict[str, Any]
    """The coordinator's; see `Coordinator`."""
    prompts: int

    @property
    def notes(self) -> dict[str, Any]:
        """For the manifest."""
        return {"prompts": self.prompts, "steps": self.job.steps}

    @property
    def writes(self) -> list[Path]:
        """What the learners write."""
        return [Path(self.job.checkpoints), Path(self.job.adapter_out), self.run.metrics]

    @property
    def trained(self) -> bool:
        """Whether the last step is taken: the learners write the adapter last, and whole."""
        return (Path(self.job.adapter_out) / "adapter_config.json").is_file()

    def finish(self) -> None:
        """Export the trained adapter of a residual base as a plain LoRA, and remove what only the stage needed."""
        if residual(self.config):
            out = self.run.grpo / "adapter"
            export_plain(self.run.adapter, Path(self.job.adapter_out), out, self.config.model.path)
        shutil.rmtree(self.job.checkpoints, ignore_errors=True)


def train_stage2(config: Config, run: RunDirectory) -> dict[str, Any]:
    """GRPO of the stage 2 elements on the rows of `grpo.systems`; writes `grpo/adapter`.

    Raises:
        UserError: a reward or tracker is unknown, no labelled row belongs to those Systems, every prompt is too long,
            or the cluster is too small.
    """
    stage = stage2(config, run)
    if not stage.trained:  # else a command ended between the last step and the end of the stage
        _train(stage)
    stage.finish()
    return stage.notes


def _train(stage: Stage2) -> None:
    """Take the steps that are left, and write the adapter."""
    config, metrics = stage.config, stage.job.metrics
    _require_servable(sync_of(config.grpo), stage.job.base, Path(stage.job.adapter_in))
    with (
        needing("grpo", STAGE.groups(config)),
        progress("grpo", stage.job.steps, lambda: steps_done(metrics), [notices_of(metrics)]),
        judging(config, shard_count(config.grpo)) as judge,
    ):
        plan = {**stage.plan, "judge": judge}
        staying = staying_engines(config, plan)
        run_learners(stage, Coordinator, plan, learn_worker, stage.job.payload(), stage.writes, staying)


def stage2(config: Config, run: RunDirectory) -> Stage2:
    """Check stage 2 of a run, and prepare it.

    Raises:
        UserError: as `train_stage2`.
    """
    settings = config.grpo
    require_trackers(settings.report_to, "grpo.report_to")
    require_rewards(settings)
    require_environment(settings)
    base = base_reference(config.model, run)
    rows = _questions(config, run)
    start_from = starting_adapter(config, run, "grpo")
    out = run.grpo / ("trained" if residual(config) else "adapter")
    job = GrpoJob(
        model=config.model.model_dump(mode="json"),
        settings=settings.model_dump(mode="json"),
        base=base,
        adapter_in=str(start_from.resolve()),
        adapter_out=str(out.resolve()),
        regions=str((run.partition / "regions.safetensors").resolve()) if settings.masked else None,
        canaries=[_canary(rows, each) for each in range(min(CANARIES, len(rows)))],
        checkpoints=str((run.work / "grpo").resolve()),
        metrics=str((run.metrics / "grpo.jsonl").resolve()),
        samples=str((run.metrics / "samples.jsonl").resolve()),
        steps=settings.steps or ceil(len(rows) / settings.prompts_per_step),
        coordinator=f"lorapar-coordinator-{os.getpid()}",
        run=config.name,
        seed=config.seed,
    )
    plan = {
        "settings": job.settings,
        "rows": rows,
        "steps": job.steps,
        "seed": config.seed,
        "model": base,
        "trust_remote_code": config.model.trust_remote_code,
        "withheld": [teacher.api_key_env for teacher in config.label.teachers if teacher.api_key_env],
        "lora_rank": read_object(start_from / "adapter_config.json")["r"],
        "judge": None,
    }
    return Stage2(config, run, job, plan, len(rows))


def run_learners(
    first: Stage2,
    coordinator: type[Any],
    plan: Any,
    worker: Callable[[dict[str, Any]], None],
    payload: dict[str, Any],
    writes: list[Path],
    staying: Sequence[Any] = (),
) -> None:
    """Run learners and their coordinator to the end of the stage, whose processes have room (`needing`).

    Args:
        first: the run, or the first of several, whose resources they use.
        coordinator: the class of the actor, which takes `plan`.
        worker: a learner's function, which takes `payload`.
        staying: rollout engines of this process, which are left running.

    Raises:
        UserError: the cluster is too small, or an engine or a learner reports one.
    """
    import ray

    settings, name = first.config.grpo, first.job.coordinator
    if settings.policy_transport == "direct":
        on_a_worker(require_nixl)  # before minutes of starting engines
    if few := too_few_shards(settings):
        console.print(f"  {few}")
    # every learner waits in a call for its batch; pings and policies must not wait behind them
    options = {"name": name, "max_concurrency": 10_000, "max_restarts": RESTARTS}
    with nullcontext() if staying else reserved(first.config) as placement_group:
        handed = HandedEngines(dict(enumerate(staying)), partial(new_engine, plan, None)) if staying else None
        actor = ray.remote(coordinator).options(**beside_the_driver(), **options).remote(plan, handed, placement_group)
        try:
            engines = actor.start.remote()  # in parallel with the learners, whose first policy waits
            run_workers(
                worker,
                payload,
                name="grpo",
                workers=settings.learners,
                max_workers=settings.max_learners,
                multiple=settings.sequence_parallel,
                resources=settings.learner_resources,
                others=Others(placement_group, settings.rollout_resources, without_a_bundle(first.config)),
                run=first.run,
                writes=writes,
                before_restart=partial(_make_room, name) if settings.extra_rollout_actors else None,
                part_of_more=True,
            )
        except Exception:
            if ray.wait([engines], timeout=0)[0]:
                ray.get(engines)  # an engine's start error says more than the waiting learners' error
            raise
        finally:
            if staying:
                ray.kill(actor)  # with all that it owns
            else:
                _stop(actor)


def _require_servable(sync: str, base: str, adapter: Path) -> None:
    """Check before anything starts that engines can merge the adapter into their base.

    Raises:
        UserError: the base's files use other names for the adapted weights.
    """
    if sync == "merged":
        missing = where_models_are(unmergeable, base, list(read_adapter_state(adapter)))
        if missing:
            raise UserError(not_in_the_files(missing, base))


def _make_room(coordinator: str) -> None:
    """End the extra engines, whose resources may be what the learners lack after the loss of a node."""
    import ray

    with contextlib.suppress(ray.exceptions.RayError, ValueError):  # lost with its engines, and perhaps begun again
        ray.get(ray.get_actor(coordinator).make_room.remote(), timeout=ROOM_LIMIT_S)


def _stop(coordinator: Any) -> None:
    """End the coordinator and its actors, also if it is already dead or another error is being raised."""
    import ray

    with contextlib.suppress(ray.exceptions.RayError):
        ray.get(coordinator.stop.remote(), timeout=STOP_LIMIT_S)
    ray.kill(coordinator)


def _questions(config: Config, run: RunDirectory) -> Questions:
    """The labelled rows of `grpo.systems` whose prompts are short enough."""
    settings = config.grpo
    tokens = token_table(config, run)
    chosen = Selection(str(tokens.resolve()), settings.systems, "grpo.systems", settings.max_prompt_length + 1)
    field = "grpo.max_prompt_length"
    require_room(run, TokenTable(tokens), [chosen], stage="grpo", field=field, of_prompt=True)
    return Questions(chosen)


def _canary(rows: Questions, index: int) -> list[Any]:
    """Token ids of a row, and where those begin whose log-probabilities are compared."""
    ids = rows.excerpt(index, CANARY_TOKENS, of_response=CANARY_TOKENS - CANARY_CONTEXT)
    return [ids, min(CANARY_CONTEXT, len(ids) // 2)]


def steps_done(*metrics: str) -> tuple[int, str]:
    """See `training_progress`."""
    return training_progress(metrics, "starting engines and learners", _remark)


def _remark(last: Sequence[dict[str, Any]]) -> str:
    rewards = ", ".join(f"{line['reward']:.3f}" for line in last)
    return f"reward {rewards} length " + ", ".join(f"{line['completion_length']:.0f}" for line in last)
