"""Connecting to Ray: the cluster this process belongs to, or one on this machine."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from lorapar_ray.cluster_token import NOT_ACCEPTED, refused
from lorapar_ray.errors import UserError
from lorapar_ray.interrupts import terminable
from lorapar_ray.ray_files import ENGINE_FILES, RayFiles, local_files
from lorapar_ray.replaced import replaced
from lorapar_ray.text import one_line
from lorapar_ray.threads import in_a_thread
from lorapar_ray.versions import uses_gpus

CONNECT_TIMEOUT_S = 20
"""Time for a cluster to answer."""
JOIN_TIMEOUT_S = 120
"""Time for Ray to connect to a cluster that has answered."""
ONE_MACHINE = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
"""The driver's own machine is never drained, so no process needs to watch for that; and polling a few workers twice a
second is cheap."""
START_TRIES = 2
"""Ray waits half a minute for its raylet, and takes ports that another Ray may take at the same moment."""
AWAY = "run this on a machine of the cluster, or set RAY_ADDRESS to the cluster's host:port"
LOG_LEVEL = "RAY_BACKEND_LOG_LEVEL"
QUIET = {LOG_LEVEL: "fatal"}
"""Ray's C++ code prints its errors directly to the terminal, such as a warning about any actor pool of Ray Data. Errors
also reach the driver as exceptions or events; `--verbose` shows both."""

_started_here = False


@contextmanager
def ray_session(verbose: bool = False, *, running: bool = False) -> Iterator[None]:
    """Be connected to Ray while the block runs; SIGTERM raises `Terminated` in it.

    Inside a submitted job, or with RAY_ADDRESS set, that is the running cluster. Otherwise a Ray is started on this
    machine, reachable from this machine only, and stopped afterwards, its files removed.

    Args:
        verbose: forward the workers' own output to this terminal.
        running: start none; without RAY_ADDRESS connect to the Ray that runs on this machine.

    Raises:
        UserError: RAY_ADDRESS names a cluster that does not answer, none runs here, or a local Ray cannot start.
    """
    import logging

    import ray

    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if not verbose:
        os.environ.setdefault("RAY_DATA_LOG_LEVEL", "ERROR")
    logs = {"log_to_driver": verbose, "logging_level": logging.INFO if verbose else logging.ERROR}
    address = os.environ.get("RAY_ADDRESS", "").strip()
    if running and address == "local":
        raise UserError("RAY_ADDRESS=local names no cluster; unset it on a machine of the cluster")
    with _cluster(address, logs) if running or address not in ("", "local") else _local(logs), terminable():
        yield


def is_own_ray() -> bool:
    """Whether this process has started the Ray that it is connected to, so that all of it ends with this process."""
    return _started_here


@contextmanager
def _cluster(address: str, logs: dict[str, Any]) -> Iterator[None]:
    """Connect to the Ray at an address, or to the one on this machine ("")."""
    import ray

    where = f"at RAY_ADDRESS={address}" if address else "on this machine"

    if address.startswith(("http://", "https://")):
        raise UserError(
            f"RAY_ADDRESS={address} is the URL of a cluster's dashboard, which `lorapar submit --address` takes; on a "
            "machine of the cluster set it to auto"
        )
    try:
        require_ray_at(address)
        found = address or "auto"
        with _quiet(logs):
            in_a_thread(lambda: ray.init(address=found, **logs), name="connecting to Ray", timeout_s=JOIN_TIMEOUT_S)
    except Exception as error:
        if refused(error):
            raise UserError(f"the cluster {where} {NOT_ACCEPTED}") from error
        if not isinstance(error, _NO_RAY):
            raise
        why = one_line(error, 120) or type(error).__name__
        fix = "start it with `ray start --head` or unset RAY_ADDRESS" if address else AWAY
        missing = f"no Ray at RAY_ADDRESS={address}" if address else "no Ray on this machine"
        raise UserError(f"{missing} ({why}); {fix}") from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _local(logs: dict[str, Any]) -> Iterator[None]:
    import ray

    global _started_here
    with ExitStack() as stack:
        files = stack.enter_context(local_files())
        stack.enter_context(_loopback_only())
        stack.enter_context(_environment(ONE_MACHINE | {ENGINE_FILES: str(files.sockets.parent)}))
        stack.enter_context(_without_helpers(keep_logs=logs["log_to_driver"]))
        _start(files, logs)
        _started_here = True
        try:
            yield
        finally:
            _started_here = False
            ray.shutdown()


def _start(files: RayFiles, logs: dict[str, Any]) -> None:
    """Start Ray on this machine, in `START_TRIES` tries.

    Ray counts GPUs by asking NVIDIA's driver, also where the installed packages cannot use them.

    Raises:
        UserError: it does not start.
    """
    import ray

    gpus = None if uses_gpus() else 0  # None: all that are visible
    for left in reversed(range(START_TRIES)):
        try:
            with _quiet(logs):
                ray.init(
                    address="local",
                    include_dashboard=False,
                    num_gpus=gpus,
                    _temp_dir=str(files.sockets),
                    object_spilling_directory=str(files.spilled),
                    **logs,
                )
            return
        except Exception as error:  # Ray raises errors of many kinds, and a bare Exception
            ray.shutdown()
            if not left:
                raise UserError(
                    f"Ray could not start on this machine with its files in '{files.sockets}' "
                    f"({one_line(error, 120)}); RAY_TMPDIR names another place for them; try `lorapar doctor`"
                ) from error


_NO_RAY = (ConnectionError, RuntimeError, ValueError, TimeoutError, OSError, AssertionError)


@contextmanager
def _quiet(logs: dict[str, Any]) -> Iterator[None]:
    """Keep the Ray that this block connects to from printing C++ errors, and a line about this setting."""
    if logs["log_to_driver"]:
        yield
        return
    with tempfile.TemporaryFile() as aside, _environment(QUIET):
        terminal = os.dup(2)
        os.dup2(aside.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)
            aside.seek(0)
            for line in aside:
                if LOG_LEVEL.encode() not in line:
                    os.write(2, line)


@contextmanager
def _loopback_only() -> Iterator[None]:
    """Let Ray's servers, and what vLLM advertises, stay on 127.0.0.1.

    Ray takes any given loopback address for "this node" and then listens on every interface. With this setting, which
    means that the machine cannot be part of a cluster, it uses only the loopback interface.
    """
    from ray._private import ray_constants

    here = {ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0", "VLLM_HOST_IP": "127.0.0.1"}
    with _environment(here), replaced(ray_constants, "ENABLE_RAY_CLUSTER", False):
        yield


@contextmanager
def _without_helpers(keep_logs: bool) -> Iterator[None]:
    """Let the Ray that starts meanwhile have no autoscaler, no server for tools that ask about a cluster, and no
    reader of its workers' logs.

    One machine's Ray uses none of them. Each is a process: together three seconds of a core at every start, for some of
    which Ray waits.

    Args:
        keep_logs: the workers' output is wanted here, so their logs are read.
    """
    from ray._private.node import Node

    unused = ["start_monitor", "start_api_server"] + ([] if keep_logs else ["start_log_monitor"])
    with ExitStack() as stack:
        for name in filter(partial(hasattr, Node), unused):
            stack.enter_context(replaced(Node, name, lambda *_, **__: None))
        yield


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set these variables, for this process and its children, unless the user has set them."""
    own = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(own)
    try:
        yield
    finally:
        for name in own:
            os.environ.pop(name, None)


def require_ray_at(address: str) -> None:
    """Check that a Ray answers at the address: Ray itself would retry for minutes and print only C++ warnings.

    Args:
        address: `host:port` of a cluster, `ray://host:port` of a Ray client server; others (`auto`) are not checked.

    Raises:
        OSError: nothing answers within `CONNECT_TIMEOUT_S`, or the server is not Ray.
        UserError: it is Ray and wants another token.
    """
    place = address.removeprefix("ray://")
    host, _, port = place.rpartition(":")
    if not port.isdecimal():
        return
    socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
    import grpc
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    channel = init_grpc_channel(place)
    try:
        if address.startswith("ray://"):
            grpc.channel_ready_future(channel).result(timeout=CONNECT_TIMEOUT_S)
        else:
            ask = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel).GetClusterId
            ask(gcs_service_pb2.GetClusterIdRequest(), timeout=CONNECT_TIMEOUT_S)
    except grpc.FutureTimeoutError as error:
        raise OSError("the server there is not a Ray client server") from error
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.UNAUTHENTICATED:  # Ray itself would only say that it cannot connect
            raise UserError(f"the cluster at RAY_ADDRESS={address} {NOT_ACCEPTED}") from error
        raise OSError(f"the server there is not a Ray cluster: {error.code().name}") from error
    finally:
        channel.close()
