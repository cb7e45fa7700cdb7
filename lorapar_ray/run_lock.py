"""One command at a time works in a run directory. The lock is a file that only one can create, so it needs no POSIX
locks, which network file systems break.

The file names its holder. On the same machine a dead holder is detected by its process; on another machine by the
file, since a living holder touches it every `BEAT_S`: it stays untouched while it is watched for `SILENT_S`, or it is
old already. A clock that is set forwards makes every file old, so an old one must also stay untouched while it is
watched (`SURE_S`). A holder that slept until another command took its lock writes nothing more.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from lorapar_ray.errors import UserError
from lorapar_ray.progress import console
from lorapar_ray.threads import stop_this_command

NAME = "lock.json"
BEAT_S = 5.0
BEAT = "beat_s"
"""A lock's field: how often its holder touches it. Earlier versions do so every 20 s, and do not say it."""
RETRY_S = 2.0
WAIT = "LORAPAR_WAIT_S"
"""Environment variable: seconds for which a command waits for the lock."""
JOB_WAIT_S = "400"
"""Wait of a job, which may restart while its dead driver is not yet known to be dead: longer than `STALE_S`."""
STALE_S = 300.0
"""Age from which the lock of another machine's holder is stale."""
SURE_S = 30.0
"""How long a stale lock is watched before it is taken over."""
SILENT_S = 75.0
"""How long the lock of another machine's holder is watched, whatever its age, before it is taken over: 15 beats. A
holder lives through a disk or a network that hangs for most of that."""
LOOK_S = 2 * RETRY_S
"""So much at most counts of the time between two looks: a file system that hangs for all of its machines is no sign of
a holder's death."""


class InUse(UserError):
    """A living process holds the lock."""


class PerhapsInUse(InUse):
    """The lock is stale, but has not been watched for `SURE_S` yet."""


class _Seen(NamedTuple):
    """State of a watched lock."""

    changed_s: float
    """When it was touched, by the clock of its file system."""
    untouched: float
    """Seconds for which it has been watched in this state."""
    looked: float
    """When it was last looked at (monotonic)."""
    beats: bool
    """Whether it was touched while watched."""


class Watch:
    """Distinguishes dead holders of a lock from living ones: by their process here, by their beat on other machines."""

    def __init__(self) -> None:
        self._seen: _Seen | None = None

    def lives(self, holder: dict[str, Any], changed_s: float, age: float) -> bool | None:
        """Whether the holder is alive; None: not yet known. Call it again, as if it were alive, every `RETRY_S`.

        Args:
            changed_s: when the lock was touched, by the clock of its file system.
            age: seconds since then, by the same clock; wrong if the clock was set meanwhile.
        """
        if _is_here(holder):
            return lives(holder, age)
        now = time.monotonic()
        if self._seen is None or self._seen.changed_s != changed_s:
            self._seen = _Seen(changed_s, 0.0, now, beats=self._seen is not None)
        else:
            untouched = self._seen.untouched + min(now - self._seen.looked, LOOK_S)
            self._seen = self._seen._replace(untouched=untouched, looked=now)
        silent_s = SILENT_S if BEAT in holder else STALE_S
        if self._seen.beats or age < STALE_S:
            return self._seen.untouched < silent_s
        return False if self._seen.untouched >= SURE_S else None


_held: dict[Path, int] = {}
"""Locks of this process, with the number of nested blocks of each."""
_written: dict[Path, str] = {}
"""What this process wrote into each."""
_guard = threading.Lock()


@contextmanager
def run_lock(root: Path, wait_s: float = 0.0) -> Iterator[None]:
    """Hold the lock of an existing run directory while the block runs; blocks of one process may nest.

    Args:
        wait_s: how long to wait until the holder ends or is seen to be dead (on another machine `SILENT_S`, or
            `STALE_S` for one of an earlier version).

    Raises:
        UserError: a living process holds it; the message names it.
    """
    with _guard:
        inside = _held.get(root, 0)
        if not inside:
            _written[root] = _take_within(root / NAME, wait_s)
        _held[root] = inside + 1
    stop = threading.Event()
    if not inside:
        threading.Thread(target=_beat, args=(root, stop), daemon=True, name="run-lock").start()
    try:
        yield
    finally:
        stop.set()
        with _guard:
            _held[root] -= 1
            if not _held[root]:
                del _held[root]
                if not _taken_over(root, _written.pop(root)):
                    (root / NAME).unlink(missing_ok=True)


def living_holder(root: Path) -> dict[str, Any] | None:
    """The command that works in a run directory: pid, host, command, since; None if there is none.

    If this machine's clock says that it is gone, its file system's is asked, which takes a file there for a moment.
    """
    try:
        text, age = _text_of(root / NAME), time.time() - (root / NAME).stat().st_mtime
    except OSError:
        return None
    holder = parsed(text)
    if not lives(holder, age) and not _is_here(holder):
        with suppress(OSError):  # it may be read only, or the holder has just ended
            age = _age(root / NAME)
    return holder if lives(holder, age) else None


def require_held(root: Path) -> None:
    """If this process holds the lock, check that no other process has taken it over.

    Raises:
        UserError: another has; this process must not write to the run any more.
    """
    mine = _written.get(root)
    if mine is not None and _taken_over(root, mine):
        raise UserError(f"run directory '{root}' was taken over by another command; this one has stopped")


def _taken_over(root: Path, mine: str) -> bool:
    try:
        return _text_of(root / NAME) != mine
    except OSError:  # deleted, or temporarily unreadable: no other process holds it
        return False


def _take_within(file: Path, wait_s: float) -> str:
    """Repeat `_take` while a living process holds the lock, for at most `wait_s`."""
    deadline, said, watch = time.monotonic() + wait_s, False, Watch()
    while True:
        try:
            return _take(file, watch)
        except InUse as error:
            unsure = isinstance(error, PerhapsInUse)
            if time.monotonic() > deadline and not unsure:
                raise
            if not said:
                console.print(f"  waiting up to {max(wait_s, SURE_S if unsure else 0):g} s: {error}")
            said = True
            time.sleep(RETRY_S)


def _take(file: Path, watch: Watch) -> str:
    """Create the lock; returns its content."""
    mine = json.dumps(identity() | {"token": uuid.uuid4().hex, BEAT: BEAT_S})
    try:
        while not _created(file, mine):
            _remove_if_stale(file, watch)
    except OSError as error:
        raise UserError(f"run directory '{file.parent}' cannot be written to ({error.strerror})") from error
    return mine


def _created(file: Path, mine: str) -> bool:
    try:
        lock = file.open("x", encoding="utf-8")
    except FileExistsError:
        return False
    try:
        with lock:
            lock.write(mine)
    except BaseException:  # a full disk: an empty lock would be taken for one that is being written
        file.unlink(missing_ok=True)
        raise
    return True


def _remove_if_stale(file: Path, watch: Watch) -> None:
    """Remove a dead holder's lock; of two processes that do this at once, neither removes the other's new lock.

    Raises:
        InUse: the holder is alive, or may be.
    """
    try:
        text, changed_s, age = _text_of(file), file.stat().st_mtime, _age(file)
    except FileNotFoundError:
        if file.is_symlink():
            raise UserError(f"'{file}' is a broken link; delete it") from None
        return
    holder = parsed(text)
    if (alive := watch.lives(holder, changed_s, age)) is not False:
        raise (InUse if alive else PerhapsInUse)(in_use(f"run directory '{file.parent}'", holder, age, file))
    aside = file.with_name(f".{NAME}.{uuid.uuid4().hex}")
    with suppress(FileNotFoundError):
        file.rename(aside)
        if (found := _text_of(aside)) != text:  # not the lock that was read: another process was faster
            _put_back(aside, file, found)
        else:
            why = "it has ended" if _is_here(holder) else f"no sign of life for {max(0.0, age):.0f} s"
            console.print(f"  takes over from process {_named(holder)}: {why}")
        aside.unlink()


def _put_back(aside: Path, file: Path, text: str) -> None:
    """Give a lock its name again, unless there is another."""
    try:
        os.link(aside, file)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        _created(file, text)


def in_use(run: str, holder: dict[str, Any], age: float, lock: object) -> str:
    """What is said of a run that another command holds.

    Args:
        run: names it.
        age: seconds since the holder's last sign of life.
        lock: what the user may delete if the holder is gone.
    """
    alive = f"last sign of life {max(0.0, age):.0f} s ago"
    return (
        f"{run} is in use by process {_named(holder, alive)}; wait for it or stop it, or delete '{lock}' if it is gone"
    )


def _named(holder: dict[str, Any], *more: str) -> str:
    """A holder's process number, machine and command."""
    pid, host, command, since = (str(holder.get(key, "?"))[:80] for key in ("pid", "host", "command", "since"))
    return f"{pid} on {host} ({', '.join([command, f'since {since}', *more])})"


def _age(file: Path) -> float:
    """Seconds since a file was touched, by its file system's clock."""
    now = file.with_name(f".{NAME}.{uuid.uuid4().hex}")
    now.touch()
    try:
        return now.stat().st_mtime - file.stat().st_mtime
    finally:
        now.unlink()


def _text_of(lock: Path) -> str:
    return lock.read_text(encoding="utf-8", errors="replace")


def parsed(text: str) -> dict[str, Any]:
    """A lock's content; empty if it is damaged."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def lives(holder: dict[str, Any], age: float) -> bool:
    """Whether a lock's holder is alive.

    Args:
        age: seconds since its last sign of life.
    """
    if age < STALE_S and not holder:
        return True  # being written
    if not _is_here(holder):
        return age < STALE_S
    return _runs(holder)


def ended(holder: dict[str, Any]) -> bool:
    """Whether a holder is known to have ended: a process of this machine that no longer runs."""
    return _is_here(holder) and not _runs(holder)


def _runs(holder: dict[str, Any]) -> bool:
    """Whether a holder of this machine still runs."""
    started = _started(holder.get("pid", -1))
    return started is not None and started == holder.get("started")


def _is_here(holder: dict[str, Any]) -> bool:
    """Whether a lock's holder is a process of this machine."""
    mine = identity()
    return all(holder.get(key) == mine[key] for key in ("host", "boot", "namespace"))


def identity() -> dict[str, Any]:
    """This process, as recorded in a lock."""
    return {
        "host": socket.gethostname(),
        "boot": _first_line("/proc/sys/kernel/random/boot_id"),
        "namespace": _pid_namespace(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": " ".join(["lorapar", *sys.argv[1:2]]),
    }


def _started(pid: int) -> int | None:
    """A process's start time, in clock ticks since boot; it detects reused pids. None if there is no such process, or
    only a zombie."""
    try:
        state, *rest = Path(f"/proc/{int(pid)}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except (OSError, ValueError, TypeError, OverflowError):
        return None
    return None if state in ("Z", "X") else int(rest[18])


def _pid_namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _first_line(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _beat(root: Path, stop: threading.Event) -> None:
    while not stop.wait(BEAT_S):
        mine = _written.get(root)
        if mine is not None and _taken_over(root, mine):
            print(f"lorapar: run directory '{root}' was taken over by another command; this one stops", file=sys.stderr)
            stop_this_command()
            return
        with suppress(OSError):
            os.utime(root / NAME)
