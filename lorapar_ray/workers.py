"""Work away from the driver: a function on every worker of a Ray Train group, or once, as a task on some machine."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorapar_ray.capacity import needing
from lorapar_ray.config import Resources
from lorapar_ray.errors import UserError
from lorapar_ray.files import write_json
from lorapar_ray.heavy_imports import import_peft
from lorapar_ray.redact import redact
from lorapar_ray.room import Others
from lorapar_ray.session import is_own_ray
from lorapar_ray.storage.workspace import Handed, workspace
from lorapar_ray.threads import in_a_thread

if TYPE_CHECKING:
    from lorapar_ray.runs import RunDirectory

RESTARTS = 2
"""How often within two hours (`train_group.WHILE_S`) a worker group is restarted after losing a worker before the stage
gives up; it can still be resumed."""
ELASTIC_RESTARTS = 20
"""The same for a group with a range of workers: its nodes are expected to be lost now and then."""
TASK_TRIES = 3
"""How often a task is tried whose process or machine is lost."""
RESIZE_S = 60.0
"""Seconds between two looks whether such a group has room for more workers."""


def run_workers(
    function: Callable[[dict[str, Any]], None],
    argument: dict[str, Any],
    *,
    name: str,
    workers: int,
    resources: Resources,
    run: RunDirectory,
    writes: Sequence[Path],
    max_workers: int | None = None,
    multiple: int = 1,
    others: Others | None = None,
    before_restart: Callable[[], None] | None = None,
    part_of_more: bool = False,
) -> None:
    """Run `function(argument)` on every worker of a Ray Train group and wait.

    Args:
        function: importable by name on the workers.
        argument: JSON-like; the same on every worker.
        run: paths of it in `argument` are right on every worker, wherever the run lives.
        writes: files and folders of the run that the function writes.
        max_workers: None: always `workers`. Else as many as there is room for, from `workers` to this number; whenever
            nodes come or go, the function is called again, by another number of workers.
        multiple: divides every such number.
        others: the rest of the stage, which gets its room before the workers above the fewest.
        before_restart: called, in another process of this machine, before workers start again, after a loss or as
            another number.
        part_of_more: the stage has other processes too, and the caller checks the room of all (`needing`).

    Raises:
        UserError: as the worker raised it, or the cluster cannot hold the group.
    """
    refusal = run.work / f"refused-{name}-{os.getpid()}.json"
    refusal.unlink(missing_ok=True)
    try:
        # On the main thread Ray Train would take over Ctrl-C and end the process with a status of its own. Here Ctrl-C
        # is the usual KeyboardInterrupt; the group ends with the Ray session.
        room = nullcontext() if part_of_more else needing(name, {"workers": (workers, resources)})
        with room, run.shared(*writes, refusal) as handed:
            task = {"function": function, "argument": argument, "refusal": refusal, "run": handed}
            number = workers if max_workers is None else (workers, max_workers)
            trainer = _group(task, name, number, multiple, resources, run, others, before_restart)
            in_a_thread(trainer.fit, name="ray-train")
    finally:
        if refusal.is_file():
            said = json.loads(refusal.read_text(encoding="utf-8"))
            refusal.unlink()
            raise UserError(said)


def _group(
    task: dict[str, Any],
    name: str,
    workers: int | tuple[int, int],
    multiple: int,
    resources: Resources,
    run: RunDirectory,
    others: Others | None,
    before_restart: Callable[[], None] | None,
) -> Any:
    """The workers of a task; Ray Train keeps its own books beside the run's files."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig

    from lorapar_ray.scaling import RoomPolicy
    from lorapar_ray.train_group import BeforeRestarts, FixedNumber, TrainGroup

    remote, elastic = run.remote, isinstance(workers, tuple)
    scaling = ScalingConfig(
        num_workers=workers,
        elastic_resize_monitor_interval_s=RESIZE_S,
        use_gpu=resources.gpu_count > 0,
        resources_per_worker=bundle(resources),
        label_selector=resources.nodes or None,
    )
    if elastic:
        policy: Any = RoomPolicy(scaling, resources, multiple, others)
    else:
        policy = FixedNumber(scaling) if is_own_ray() else None
    return TrainGroup(
        _work,
        train_loop_config=task,
        scaling_config=scaling,
        policy=policy,
        run_config=RunConfig(
            name=f"{name}-{os.getpid()}",
            storage_path=str(run.work / "ray") if remote is None else (remote.uri / "work/ray").path,
            storage_filesystem=None if remote is None else remote.objects.file_system,
            failure_config=FailureConfig(max_failures=ELASTIC_RESTARTS if elastic else RESTARTS),
            worker_runtime_env={"env_vars": worker_environment(resources)},
            callbacks=[] if before_restart is None else [BeforeRestarts(before_restart)],
        ),
    )


def _work(task: dict[str, Any]) -> None:
    """Run the function on a worker; what a user has to fix is written down, since a restart would only repeat it."""
    with workspace(task["run"]) as rebased:
        refusal: Path = rebased(task["refusal"])
        if refusal.is_file():
            return
        import_peft()  # torch and transformers with it: what each of these functions begins with
        try:
            task["function"](rebased(task["argument"]))
        except UserError as error:
            write_json(
                refusal, redact(str(getattr(error, "cause", error)))
            )  # one that came from an actor carries its traceback
            raise


def on_a_worker(
    function: Callable[..., Any],
    *arguments: Any,
    resources: Resources | None = None,
    run: RunDirectory | None = None,
    writes: Sequence[Path] = (),
    environment: Mapping[str, str] | None = None,
) -> Any:
    """Run `function(*arguments)` as a Ray task and wait for what it returns.

    Args:
        function: importable by name on the workers.
        resources: None: no core of its own, and no GPU. A task with a GPU has a process of its own, which ends with it.
        run: paths of it in the arguments are right where the task runs; None: there are none.
        writes: files and folders of the run that the function writes.
        environment: more variables of the process, which runs no task with others.

    Raises:
        UserError: as the task raised it.
        ray.exceptions.RayError: the task's process or machine was lost `TASK_TRIES` times.
    """
    import ray

    asked = Resources(cpus=0) if resources is None else resources
    variables = {**worker_environment(asked), **(environment or {})}
    # Ray keeps a task's process for the next one, and with it the process's memory of the GPU that Ray counts as free.
    # It ends it after one call if the decorator says so; GPUs named in `options` do not tell it to.
    remote = ray.remote(max_calls=1) if asked.gpu_count else ray.remote
    # Ray's own retries have no end where memory is missing
    task = remote(_told).options(**ray_options(asked), max_retries=0, runtime_env={"env_vars": variables})
    with nullcontext() if run is None else run.shared(*writes) as handed:
        result, problem = _tried(lambda: ray.get(task.remote(function, arguments, handed)))
    if problem is not None:
        raise UserError(problem)
    return result


def where_models_are(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run a quick `function(*arguments)` on a machine that has the models, and wait for what it returns.

    On a Ray of this process's own that is this machine, and no process has to start for it; else see `on_a_worker`.

    Raises:
        UserError: as the function raised it.
    """
    return function(*arguments) if is_own_ray() else on_a_worker(function, *arguments)


def _tried(call: Callable[[], Any]) -> Any:
    """`call()`, again if its process or machine is lost."""
    import ray

    for _ in range(TASK_TRIES - 1):
        try:
            return call()
        except ray.exceptions.RayTaskError:  # its own error
            raise
        except ray.exceptions.RayError:
            continue
    return call()


def _told(function: Callable[..., Any], arguments: tuple[Any, ...], handed: Handed | None) -> tuple[Any, str | None]:
    """(result, None), or (None, message of a user's error): as an error it would carry the worker's traceback."""
    try:
        with workspace(handed) as rebased:
            return function(*rebased(arguments)), None
    except UserError as error:
        return None, str(error)


def actor_ended(error: BaseException) -> bool:
    """Whether a call failed because its actor has ended, or cannot be reached.

    Where Ray ends an actor to free memory, a call fails with `OutOfMemoryError`, which is no `RayActorError`.
    """
    import ray

    return isinstance(error, ray.exceptions.RayActorError | ray.exceptions.OutOfMemoryError)


def beside_the_driver() -> dict[str, Any]:
    """Options of an actor that asks for no core and without which a stage ends: the machine that it goes to is the one
    without which the stage ends in any case, as with Ray Train's controller. Left to Ray it could be any."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(here, soft=False)}


def worker_environment(resources: Resources) -> dict[str, str]:
    """Environment of a process that computes with torch: as many threads as it asked for cores, and no hub look-ups."""
    threads = {"OMP_NUM_THREADS": str(resources.compute_threads), "TOKENIZERS_PARALLELISM": "false"}
    return threads | hidden_gpus(resources)


def hidden_gpus(resources: Resources) -> dict[str, str]:
    """Environment that hides a machine's GPUs from a process that asked for none; Ray alone would show it all."""
    return {} if resources.gpu_count else {"CUDA_VISIBLE_DEVICES": ""}


def bundle(resources: Resources) -> dict[str, float]:
    """What one process asks for, in Ray's words."""
    return {"CPU": resources.cpus} | ({"GPU": resources.gpu_count} if resources.gpu_count else {})


def ray_options(resources: Resources) -> dict[str, Any]:
    """The same as options of an actor or a task that is not in a placement group."""
    nodes = {"label_selector": dict(resources.nodes)} if resources.nodes else {}
    return {"num_cpus": resources.cpus, "num_gpus": resources.gpu_count, **nodes}
