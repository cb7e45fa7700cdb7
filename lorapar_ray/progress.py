"""Progress of work in other processes: the driver polls a cheap count and draws a bar.

On a terminal this is a live bar; in a log (a submitted job, CI) it is an occasional line. Progress is read from files
that stages write anyway (finished units, metrics lines), so a resumed run's bar starts at the finished work.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lorapar_ray.boundary import last_line
from lorapar_ray.errors import UserError
from lorapar_ray.files import write_json
from lorapar_ray.text import shown


class SafeConsole(Console):
    """A console on which foreign text is only text: no markup unless a call asks for it, no control characters, no
    secrets. With `markup=True` the foreign parts go through `lorapar_ray.text.markup`."""

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*(shown(each) if isinstance(each, str) else each for each in objects), **options)


console = SafeConsole(highlight=False, soft_wrap=True, markup=False, emoji=False)
LOG_EVERY_S = 10.0
NOTE_EVERY_S = 2.0
FEW = 10

Report = Callable[[str, int], Callable[[int], None]]
"""(name of the work, the count at which it is done) → a function that receives the count so far."""

_note: ContextVar[tuple[Path, str, Report] | None] = ContextVar("note", default=None)


@contextmanager
def noted_in(file: Path, stage: str, report: Report) -> Iterator[None]:
    """Write the block's progress to `file`, for `lorapar status`; the file is deleted at its end.

    `report` also gets it. At first the file only names the stage, in place of what a killed process left there.
    """
    _write_note(file, {"stage": stage})
    token = _note.set((file, stage, report))
    try:
        yield
    finally:
        _note.reset(token)
        file.unlink(missing_ok=True)


@contextmanager
def progress(
    what: str, total: int, poll: Callable[[], tuple[int, str]], notices: Sequence[Path] = ()
) -> Iterator[None]:
    """Show `what` while the block runs.

    Args:
        what: name of the work, e.g. `score system 1`.
        total: count at which it is done.
        poll: cheap and safe to call from another thread; gives the count so far and a short remark (a loss, a rate).
        notices: files to which workers add lines for the user; each line is printed once.
    """
    stop = threading.Event()
    draw = _bar if console.is_terminal else _lines
    threads = [threading.Thread(target=draw, args=(what, total, poll, stop), daemon=True)]
    if (note := _note.get()) is not None:
        threads.append(threading.Thread(target=_note_down, args=(*note, what, total, poll, stop), daemon=True))
    if notices:
        threads.append(
            threading.Thread(target=_pass_on, args=({file: _length(file) for file in notices}, stop), daemon=True)
        )
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:  # a note that is still being written would outlive the work
            thread.join()


def _note_down(
    file: Path,
    stage: str,
    report: Report,
    what: str,
    total: int,
    poll: Callable[[], tuple[int, str]],
    stop: threading.Event,
) -> None:
    pace, told = Pace(total), report(what, total)
    while not stop.is_set():
        done, remark = poll()
        told(done)
        figures = {"what": what, "done": done, "total": total, "left": pace.left(done), "remark": remark}
        _write_note(file, {"stage": stage, **figures})
        stop.wait(NOTE_EVERY_S)


def _write_note(file: Path, note: dict[str, Any]) -> None:
    with suppress(OSError, UserError):  # a full disk ends the stage with its own message
        write_json(file, {**note, "now": time.time()})


def _pass_on(read: dict[Path, int], stop: threading.Event) -> None:
    """Print the new lines of files, which are read from these bytes on; one that is in several files, once."""
    told: set[str] = set()
    finished = False
    while not finished:
        finished = stop.wait(NOTE_EVERY_S)
        for file, before in read.items():
            with suppress(OSError), file.open("rb") as lines:
                lines.seek(before)
                new = lines.read()
                new = new[: new.rfind(b"\n") + 1]  # the rest is still being written
                read[file] += len(new)
                for line in new.decode(errors="replace").splitlines():
                    if line not in told:
                        told.add(line)
                        console.print(f"  {line}")


def _length(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0


def _bar(what: str, total: int, poll: Callable[[], tuple[int, str]], stop: threading.Event) -> None:
    columns = (
        TextColumn("  {task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[remark]}", markup=False),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(what, total=total, remark="")
        while not stop.wait(0.5):
            done, remark = poll()
            bar.update(task, completed=done, remark=remark)
        done, remark = poll()
        bar.update(task, completed=done, remark=remark)


def _lines(what: str, total: int, poll: Callable[[], tuple[int, str]], stop: threading.Event) -> None:
    pace, shown = Pace(total), None
    while True:
        finished = stop.wait(LOG_EVERY_S)
        done, remark = poll()
        if finished or done != shown:
            console.print(f"  {what} {done}/{total}{pace.left(done)} {remark}".rstrip())
            shown = done
        if finished:
            return


def training_progress(
    metrics: Sequence[str], starting: str, remark: Callable[[Sequence[dict[str, Any]]], str]
) -> tuple[int, str]:
    """Steps so far, and a remark, of runs that train together; for `progress`.

    Args:
        metrics: each run's file of metrics, one line per step.
        starting: the remark before the first step.
        remark: makes one of the runs' last lines.
    """
    last = [line for file in metrics if (line := last_line(Path(file)))]
    return (sum(line["step"] for line in last), remark(last)) if last else (0, starting)


class Pace:
    """Estimates the remaining time from the pace since the first progress; the time before that was the start."""

    def __init__(self, total: int) -> None:
        """`total`: the count at which the work is done; for small totals there is no estimate."""
        self._total = total
        self._before: int | None = None
        self._since: tuple[int, float] | None = None

    def left(self, done: int) -> str:
        """As ` · m:ss left`; empty if there is no estimate yet."""
        now = time.monotonic()
        if self._before is not None and done > self._before and self._since is None:
            self._since = done, now
        self._before = done
        if self._since is None or self._total < FEW or not self._since[0] < done < self._total:
            return ""
        first, start = self._since
        seconds = (now - start) / (done - first) * (self._total - done)
        return f" · {minutes(seconds)} left"


def minutes(seconds: float) -> str:
    """A duration as `m:ss`."""
    return f"{int(seconds // 60)}:{int(seconds % 60):02d}"
