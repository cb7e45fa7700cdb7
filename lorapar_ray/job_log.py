"""A Ray job's log, shown in whole lines while it grows, also over connections that break."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from lorapar_ray.errors import UserError
from lorapar_ray.text import final_line, one_line, reason
from lorapar_ray.threads import in_a_thread

FINAL = ("SUCCEEDED", "FAILED", "STOPPED")
TRIES = 10
"""Attempts in a row that show nothing new, until a job is left alone."""
LAST_TRIES = 3
"""Such attempts to read the rest of the log of a job that has ended: its node may be gone."""
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 30.0
"""Before another attempt; each wait is twice as long as the one before."""
ATTACHED_S = 30.0
"""An attempt that lasts this long was a connection, also to a job that prints nothing; proxies cut quiet ones."""
QUIET_S = 300.0
"""After this time without a line the log is opened again: a connection may be lost without a sign."""
STATUS_LIMIT_S = 30.0
DUMP = "[state-dump]"
"""Beginning of the lines (twenty or more) in which Ray prints a lost node's statistics; the dashboard has them too."""
OURS = "lorapar: "
"""Beginning of the line in which a command reports why it ends."""
CAUSE_LENGTH = 300
UNKNOWN = re.compile(r"Request failed with status code 404: Job .* does not exist")
"""How the server says that it knows no such job; a proxy's 404 says something else."""
NOT_INSTALLED = "(ModuleNotFoundError: No module named 'lorapar_ray')"
"""Ends the line of a Python that does not find us."""


class JobLog:
    """Shows a job's log in whole lines while it arrives in pieces."""

    def __init__(self, show: Callable[[str], object]) -> None:
        self._show = show
        self._rest = ""
        self._known = 0
        self.length = 0
        """Characters so far."""
        self.cause = ""
        """The reason in the last line in which one of our commands reports why it ends."""

    def begin(self) -> None:
        """The log comes from its beginning again: what has come already is skipped."""
        self._known = self.length

    def add(self, text: str) -> None:
        """The next piece; it may end within a line."""
        new = text[self._known :]
        self._known = max(0, self._known - len(text))
        self.length += len(new)
        *lines, self._rest = (self._rest + new).split("\n")
        for line in lines:
            self._line(line)

    def end(self) -> None:
        """Show the rest at the end of the log."""
        if self._rest:
            self._line(self._rest)

    def _line(self, line: str) -> None:
        if line.startswith(OURS):
            self.cause = line.removeprefix(OURS)
        elif line.endswith(NOT_INSTALLED):
            self.cause = "the `python` there has no lorapar_ray; install it, and start Ray in its environment"
        if not line.lstrip().startswith(DUMP):
            self._show(line)


def keeps_running(job: str) -> str:
    """What a command says that ends before the job that it follows."""
    return f"{job} keeps running; the same command follows it again, `ray job stop {job}` ends it"


def gone(job: str) -> str:
    """What it says of a job that the server no longer knows."""
    return (
        f"the cluster no longer knows {job}: its head has started again without its state, which only Redis keeps, or "
        "the job was deleted; the same command submits the run again, and it resumes"
    )


def why_ended(details: Any) -> str:
    """Ray's reason in one line. After the exit status of a command it is the end of the log: of that, the last line.

    Args:
        details: `JobDetails` of a job that has failed.
    """
    message = details.message or ""
    status = getattr(details, "driver_exit_code", None)
    if status is None or "\n" not in message.strip():
        return one_line(message, CAUSE_LENGTH)
    return f"exit status {status}: {final_line(message, CAUSE_LENGTH)}"


def followed(client: Any, job: str, log: JobLog) -> Any:
    """Show a job's log until it ends; returns Ray's `JobDetails` of the ended job.

    The job server sends the log from its beginning at each connection, and may close a connection while the job runs.

    Args:
        client: `ray.job_submission.JobSubmissionClient`.

    Raises:
        UserError: `TRIES` attempts in a row have shown nothing new, or the server does not know the job.
    """
    failed = 0
    while True:
        began, before = time.monotonic(), log.length
        lost, details = asyncio.run(_attached(client, job, log)), None
        try:
            details = in_a_thread(lambda: client.get_job_info(job), name="its status", timeout_s=STATUS_LIMIT_S)
        except Exception as error:
            if UNKNOWN.match(str(error)):
                log.end()
                raise UserError(gone(job)) from error
            lost = reason(error)
        over = details is not None and details.status.value in FINAL
        advanced = log.length > before or (not over and time.monotonic() - began > ATTACHED_S)
        failed = 0 if advanced else failed + 1
        if over and (not lost or failed >= LAST_TRIES):
            log.end()
            return details
        if failed >= TRIES:
            raise UserError(f"no more log after {failed} attempts ({lost or 'it ended early'}); {keeps_running(job)}")
        time.sleep(min(FIRST_WAIT_S * 2 ** max(0, failed - 1), LONGEST_WAIT_S))


async def _attached(client: Any, job: str, log: JobLog) -> str:
    """Show what one connection sends until it ends; returns why it broke, or nothing if it was closed."""
    log.begin()
    texts: AsyncIterator[str] = client.tail_job_logs(job)
    while True:
        try:
            text = await asyncio.wait_for(anext(texts), QUIET_S)
        except StopAsyncIteration:
            return ""
        except Exception as error:  # Ray, aiohttp and the network each have their own
            return reason(error)
        log.add(text)
