"""Ends work that waits without end since a machine has no memory.

Ray starts again what it has killed for lack of memory, in several layers and without a limit: Serve's controller, Ray
Data's actors, Ray Train's groups. While memory is missing it kills them again, and whoever asked for them waits. Ray
reports each such kill, so the driver counts them while its work does not advance.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from lorapar_ray.errors import UserError
from lorapar_ray.session import is_own_ray
from lorapar_ray.text import one_line
from lorapar_ray.threads import meanwhile, stop_this_command

LOOK_S = 10.0
LOOKS = 6
"""So many looks must find new kills, and no progress since the first of them. A shortage of a moment is one or two."""
REASON_LENGTH = 200


class Shortage:
    """Counts the looks that found new kills."""

    def __init__(self, before: Mapping[Any, str]) -> None:
        """`before`: kills that happened before the work began, with Ray's words, by any key."""
        self._known = set(before)
        self._bad_looks = self._kills = 0
        self._advances = False

    def advanced(self) -> None:
        """The work has made progress."""
        self._bad_looks = self._kills = 0
        self._advances = True

    def worth_a_look(self) -> bool:
        """Whether there was no progress since the last call. Ray's table has up to 100,000 rows, which work that
        advances need not read."""
        quiet, self._advances = not self._advances, False
        return quiet

    def look(self, killed: Mapping[Any, str]) -> str:
        """Why the work has to end; empty: it may go on.

        Args:
            killed: all kills so far.
        """
        new = [key for key in killed if key not in self._known]
        self._known.update(new)
        self._bad_looks += bool(new)
        self._kills += len(new)
        if self._bad_looks < LOOKS or not new:
            return ""
        return f"Ray killed {self._kills} processes while nothing advanced, the last one: {killed[new[-1]]}"


_watched: ContextVar[Shortage | None] = ContextVar("watched", default=None)


@contextmanager
def ended_without_memory(work: str) -> Iterator[Callable[[], None]]:
    """Interrupt the block, on the main thread, if it does not advance while Ray kills its processes again and again.

    Yields a function to call, from any thread, after each progress. A block inside another one, as of several runs that
    do a stage together, yields that of the other.

    Raises:
        UserError: in place of what the interrupt raised.
    """
    outer = _watched.get()
    if outer is not None:
        yield outer.advanced
        return
    shortage, why = Shortage(killed_for_memory()), ""
    token = _watched.set(shortage)

    def look() -> None:
        nonlocal why
        if not why and shortage.worth_a_look() and (found := shortage.look(killed_for_memory())):
            why = found
            stop_this_command()

    main = threading.current_thread() is threading.main_thread()
    try:
        if main:
            with meanwhile(look, every_s=LOOK_S):
                yield shortage.advanced
        else:  # only the main thread can be interrupted
            yield shortage.advanced
    except BaseException as error:
        if not why:
            raise
        raise out_of_memory(work, why) from error
    finally:
        _watched.reset(token)


def killed_for_memory() -> dict[bytes, str]:
    """Ray's words about each process of this driver that it killed for lack of memory (see `kills_in`). Empty without
    Ray, or while its head does not answer."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return {}
    from ray._private.state import state

    try:
        rows = state._connect_and_get_accessor().get_worker_table()
        job = None if is_own_ray() else bytes.fromhex(ray.get_runtime_context().get_job_id())
    except Exception:  # the connection may be ending
        return {}
    return kills_in(rows, job)


def kills_in(rows: Iterable[bytes], job: bytes | None) -> dict[bytes, str]:
    """Ray's words about each process that it killed for lack of memory, by the process's id, in the order of the ends.

    Args:
        rows: of Ray's table of workers (`WorkerTableData` of its `gcs.proto`).
        job: count processes of this job alone: others on a shared cluster say nothing about this one. Processes that
            belong to no job yet are none of it. None: all.
    """
    from ray.core.generated import common_pb2, gcs_pb2

    found = [row for row in map(gcs_pb2.WorkerTableData.FromString, rows) if job is None or row.job_id == job]
    dead = [row for row in found if not row.is_alive and row.exit_type == common_pb2.NODE_OUT_OF_MEMORY]
    return {row.worker_address.worker_id: row.exit_detail for row in sorted(dead, key=lambda row: int(row.end_time_ms))}


def out_of_memory(work: str, why: object) -> UserError:
    """The error for a user.

    Args:
        work: a stage or a command.
        why: Ray's words.
    """
    return UserError(
        f"{work}: the machine ran out of memory ({one_line(why, REASON_LENGTH)}); stop other programs, or lower the "
        "stage's number of processes or what each asks for (batches, kv_cache_gib); finished work is kept, and the "
        "same command resumes"
    )
