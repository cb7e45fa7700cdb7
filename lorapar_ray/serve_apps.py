"""Starts applications on Ray Serve, waits for them, and ends them, without console output."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from lorapar_ray.errors import UserError
from lorapar_ray.progress import console
from lorapar_ray.session import is_own_ray
from lorapar_ray.text import one_line
from lorapar_ray.threads import in_a_thread

POLL_S = 0.1
END_LIMIT_S = 90.0
"""Serve itself gives requests in flight 20 s, and kills what does not end."""


def start_serve(**http: Any) -> None:
    """Start Serve if it does not run (a running one keeps its options); `http`: Ray's `HTTPOptions`."""
    from ray import serve
    from ray.serve.config import HTTPOptions

    logging.getLogger("ray.serve").setLevel(logging.getLogger("ray").getEffectiveLevel())  # its own default is INFO
    serve.start(http_options=HTTPOptions(**http))


def runs_as_asked(app: str, **http: Any) -> bool:
    """Whether a Serve runs; if so, it listens as asked and has no such application.

    A cluster has one Serve. It keeps the HTTP options that it was started with and only warns about others, and it
    replaces an application of the same name.

    Args:
        http: Ray's `HTTPOptions`.

    Raises:
        UserError: it listens elsewhere, or the application exists.
    """
    from ray import serve

    running = _listens()
    if running is None:
        return False
    if other := [name for name, value in http.items() if running[name] != value]:
        here, asked = (", ".join(f"{name} {each[name]}" for name in other) for each in (running, http))
        raise UserError(
            f"Ray Serve runs on this cluster already, with {here} instead of {asked}, and keeps that; try again when "
            "the commands that use it have ended (label, grpo with a judge, serve), or end all that runs on it with "
            "`serve shutdown`"
        )
    if app in serve.status().applications:
        raise UserError(
            f"Ray Serve on this cluster runs '{app}' already, from another `lorapar serve`: end that command; if it "
            "was killed, `serve shutdown` ends all that runs on Serve"
        )
    return True


def _listens() -> dict[str, Any] | None:
    """The HTTP options of the running Serve; None: none runs."""
    import ray
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return None
    location = ray.get(client._controller.get_proxy_location.remote())  # the options hold it only if it was given there
    return {**client.http_config.model_dump(), "location": location.value}


def deployed(targets: Iterable[Any], apps: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Deploy all at once; yields each as it runs or has failed: its name, and why it failed (empty: it runs).

    Args:
        targets: of `serve.run_many`.
        apps: application of each name.
    """
    from ray import serve

    serve.run_many(list(targets), wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
    waiting = dict(apps)
    while waiting:
        status = serve.status().applications
        for name, app in list(waiting.items()):
            state = status[app].status if app in status else None
            if state in ("RUNNING", "DEPLOY_FAILED", "UNHEALTHY"):
                waiting.pop(name)
                yield name, "" if state == "RUNNING" else _why(status[app])
        time.sleep(POLL_S)


def _why(app: Any) -> str:
    """The exception's own line: a deployment's message ends in its traceback, an application's says less."""
    told = [each.message for each in app.deployments.values() if each.message] or [app.message]
    lines = [line.strip() for line in told[0].splitlines() if line.strip()]
    return one_line(lines[-1] if lines else "no reason given", 300)


def end(apps: Iterable[str]) -> None:
    """Free the applications' resources, and wait until they are free.

    Serve itself ends with a local Ray of this process; on a cluster it is ended unless it runs other applications.

    Raises:
        UserError: Serve does not answer, as while its controller is killed again and again for lack of memory. If
            another error is being handled, that one says more, and this one is only printed.
    """
    own, first = set(apps), sys.exc_info()[1]
    try:
        in_a_thread(partial(_end, own), name="ending applications", timeout_s=END_LIMIT_S)
    except TimeoutError as error:
        said = (
            f"Ray Serve does not end {', '.join(sorted(own))} within {END_LIMIT_S:g} s; on a cluster `serve shutdown` "
            "ends them"
        )
        if first is None:
            raise UserError(said) from error
        console.print(f"  {said}")


def _end(own: set[str]) -> None:
    from ray import serve

    alone = not is_own_ray() and set(serve.status().applications) <= own
    if alone:
        _retry_no_last_calls()
    for app in own:
        serve.delete(app, _blocking=False)
    while own & set(serve.status().applications):
        time.sleep(POLL_S)
    if alone:
        serve.shutdown()


def _retry_no_last_calls() -> None:
    """Serve's controller kills itself while two calls to it are running: one waits for its end, one listens for
    changes. Its handle retries calls forever, and for each retry Ray prints a line that looks like a failure. Here both
    are called without retries from now on; the running listening call returns when an application is deleted."""
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    if client is not None:
        for name in ("listen_for_change", "graceful_shutdown"):
            setattr(client._controller, name, getattr(client._controller, name).options(max_task_retries=0))
