"""Start and stop the hosted teachers on Ray Serve."""

from __future__ import annotations

import logging
import time

from lorapar_ray.capacity import require
from lorapar_ray.config import Config
from lorapar_ray.progress import console
from lorapar_ray.session import is_own_ray
from lorapar_ray.text import markup, one_line


def applications(config: Config) -> dict[str, str]:
    """Name of each hosted teacher's Serve application."""
    return {t.name: f"lorapar-{config.name}-{t.name}" for t in config.label.teachers if t.kind == "serve"}


def start_teachers(config: Config) -> tuple[dict[str, str], dict[str, str]]:
    """Deploy every hosted teacher, all at once, and wait until each runs or has failed.

    Returns:
        application of each that runs, and why the others do not.

    Raises:
        UserError: a model that is not there, or a cluster too small for all of them and the asking workers.
    """
    apps = applications(config)
    if not apps:
        return {}, {}
    from ray import serve
    from ray.serve.config import HTTPOptions

    from lorapar_ray.labeling.hosted import target

    hosted = [teacher for teacher in config.label.teachers if teacher.kind == "serve"]
    logging.getLogger("ray.serve").setLevel(logging.getLogger("ray").getEffectiveLevel())  # its own default is INFO
    serve.start(http_options=HTTPOptions(host="127.0.0.1", location="NoServer"))
    targets = [target(teacher, apps[teacher.name], config.label.prompt.choice, config.seed) for teacher in hosted]
    serve.run_many(targets, wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
    waiting, running, failed = dict(apps), {}, {}
    while waiting:
        status = serve.status().applications
        for name, app in list(waiting.items()):
            state = status[app].status if app in status else None
            if state == "RUNNING":
                running[name] = waiting.pop(name)
            elif state in ("DEPLOY_FAILED", "UNHEALTHY"):
                failed[name] = "it could not start: " + one_line(status[app].message, 300)
                console.print(f"  [yellow]teacher {name} abstains[/]: {markup(failed[name])}", markup=True)
                waiting.pop(name)
        time.sleep(0.1)
    return running, failed


def require_room(config: Config) -> None:
    """Fail at once, instead of waiting without end, when the cluster cannot hold the teachers and the asking workers.

    Raises:
        UserError: names the resource, what is wanted and what the cluster has.
    """
    label = config.label
    hosted = {t.name: (t.replicas, t.resources) for t in label.teachers if t.kind == "serve"}
    require("label", {**hosted, "workers": (label.workers, label.resources)}, "label.teachers")


def stop_teachers(config: Config) -> None:
    """Free the teachers' resources, and wait until they are free.

    Serve itself ends with a Ray of this process's own; on a cluster it is ended unless it runs other applications.
    """
    apps = set(applications(config).values())
    if not apps:
        return
    from ray import serve

    if not is_own_ray() and set(serve.status().applications) <= apps:
        serve.shutdown()
        return
    for app in apps:
        serve.delete(app, _blocking=False)
    while apps & set(serve.status().applications):
        time.sleep(0.1)
