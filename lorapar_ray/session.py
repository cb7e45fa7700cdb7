"""Connecting to Ray: the cluster this process belongs to, or one on this machine."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorapar_ray.errors import UserError

CONNECT_TIMEOUT_S = 20
TEMPORARY = "lorapar-ray-"


@contextmanager
def ray_session(verbose: bool = False) -> Iterator[None]:
    """Be connected to Ray while the block runs.

    Inside a submitted job, or with RAY_ADDRESS set, that is the running cluster. Otherwise a Ray is started on this
    machine and stopped afterwards, its files removed: a laptop's disk is not filled by a few runs.

    Args:
        verbose: forward the workers' own output to this terminal.

    Raises:
        UserError: RAY_ADDRESS names a cluster that does not answer, or a local Ray cannot start.
    """
    import logging

    import ray

    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    local = None if address else _temporary_files()
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    level = logging.INFO if verbose else logging.ERROR
    if not verbose:
        os.environ.setdefault("RAY_DATA_LOG_LEVEL", "WARNING")
    try:
        if address:
            _reachable(address)
            ray.init(address=address, log_to_driver=verbose, logging_level=level)
        else:
            ray.init(
                address="local",
                include_dashboard=False,
                log_to_driver=verbose,
                logging_level=level,
                _temp_dir=str(local),
            )
    except (ConnectionError, RuntimeError, ValueError, TimeoutError, OSError) as error:
        raise UserError(_no_ray(address, error)) from error
    try:
        yield
    finally:
        ray.shutdown()
        if local is not None:
            shutil.rmtree(local, ignore_errors=True)


def _temporary_files() -> Path:
    """A directory for a local Ray; those of killed runs, which could not tidy up, are removed."""
    import psutil

    root = Path(tempfile.gettempdir())
    for left in root.glob(f"{TEMPORARY}*-*"):
        pid = left.name.removeprefix(TEMPORARY).partition("-")[0]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{TEMPORARY}{os.getpid()}-"))


def _reachable(address: str) -> None:
    """A plain socket first: Ray itself retries for minutes before it says that nobody is there."""
    import socket

    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()


def _no_ray(address: str | None, error: Exception) -> str:
    reason = " ".join(str(error).split())[:120]
    if address:
        return f"no Ray at RAY_ADDRESS={address} ({reason}); start it with `ray start --head` or unset RAY_ADDRESS"
    return f"Ray could not start on this machine ({reason}); try `lorapar doctor`"
