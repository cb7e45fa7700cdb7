"""Start and stop the hosted teachers on Ray Serve."""

from __future__ import annotations

from contextlib import AbstractContextManager

from lorapar_ray.capacity import needing
from lorapar_ray.config import Config
from lorapar_ray.labeling.stage import STAGE
from lorapar_ray.progress import console
from lorapar_ray.serve_apps import deployed, end, start_serve
from lorapar_ray.text import markup


def applications(config: Config) -> dict[str, str]:
    """Serve application of each teacher that has an engine."""
    return {t.name: f"lorapar-{config.name}-{t.name}" for t in config.label.teachers if t.has_engine}


def start_teachers(config: Config) -> tuple[dict[str, str], dict[str, str]]:
    """Deploy every hosted teacher's engine, all at once, and wait until each runs or has failed.

    Returns:
        application of each teacher that runs, and why the others do not.

    Raises:
        UserError: a model does not exist, or the cluster is too small for all of them and the asking workers.
    """
    apps = applications(config)
    if not apps:
        return {}, {}
    from lorapar_ray.labeling.hosted import target

    hosted = [teacher for teacher in config.label.teachers if teacher.has_engine]
    start_serve(host="127.0.0.1", location="NoServer")
    targets = [target(teacher, apps[teacher.name], config.label.prompt.choice, config.seed) for teacher in hosted]
    running, failed = {}, {}
    for owner, why in deployed(targets, apps):
        for name in (each.name for each in config.label.teachers if owner in (each.name, each.engine_of)):
            if why:
                failed[name] = f"it could not start: {why}"
                console.print(f"  [yellow]teacher {name} abstains[/]: {markup(failed[name])}", markup=True)
            else:
                running[name] = apps[owner]
    return running, failed


def room_for_teachers(config: Config) -> AbstractContextManager[None]:
    """The block in which the cluster must have room for the teachers and the asking workers: `needing`.

    Raises:
        UserError: it cannot hold them.
    """
    return needing("label", STAGE.groups(config), STAGE.lowered_by)


def stop_teachers(config: Config) -> None:
    """Free the teachers' resources, and wait until they are free."""
    if apps := applications(config).values():
        end(apps)
