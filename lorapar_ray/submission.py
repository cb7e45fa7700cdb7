"""Submits a run to a cluster as a Ray job. The same run is submitted once; a second call follows the first job.

It uses only Ray's job server, so the submitting machine may have another version of Ray.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.request import urlopen

from lorapar_ray.cluster_token import NOT_ACCEPTED, NOT_ASKED, refused
from lorapar_ray.errors import UserError
from lorapar_ray.job_log import FINAL, JobLog, followed, why_ended
from lorapar_ray.redact import redact
from lorapar_ray.run_lock import JOB_WAIT_S, WAIT
from lorapar_ray.storage.uris import place_of
from lorapar_ray.text import one_line
from lorapar_ray.threads import in_a_thread

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
SERVER, CLUSTER = "RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"
"""Variables by which Ray's client finds the job server; the first one wins, also over an address that it is given."""
CONNECT_TIMEOUT_S = 30.0
SUBMIT_TIMEOUT_S = 600.0
AGENT_LIMIT_S = 120.0
"""A cluster that has just started takes jobs only once a node's agent runs."""
AGENT_RETRY_S = 2.0
NO_AGENT = "No available agent"
"""How the server says so."""
NOT_SENT = [".git", ".venv", ".hypothesis", "runs", "site", "**/__pycache__"]
"""Files of the working directory that are not sent."""
REFUSED = re.compile(r"Request failed with status code 40[13]\b|40[13] Client Error\b")
"""How a client says that the server wants another token, where it has no `AuthenticationError`. An address may have any
of these words and numbers."""
URL = ("http://", "https://")
SETTINGS, REDO = "settings", "redo"
"""Names in a job's metadata."""
CHATTY = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
"""Ray's loggers that report every upload and connection."""

T = TypeVar("T")


@dataclass(frozen=True)
class Submission:
    """What is handed over."""

    name: str
    """Of the run."""
    run_dir: str
    options: tuple[str, ...]
    """Of every command: the config and its overrides."""
    working_dir: Path
    redo: tuple[str, ...] = ()
    """Stages whose results are replaced."""
    settings: str = ""
    """Digest of the resolved config."""

    @property
    def key(self) -> str:
        """The common beginning of the submission ids of one run directory's jobs."""
        place = hashlib.sha256(f"{self.name}\n{self.run_dir}".encode()).hexdigest()[:8]
        return f"lorapar-{self.name}-{place}"

    @property
    def metadata(self) -> dict[str, str]:
        """What the job server keeps of it, to compare a later submission with."""
        return {"run": self.name, "run_dir": self.run_dir, SETTINGS: self.settings, REDO: " ".join(self.redo)}

    def not_in(self, kept: Mapping[str, str]) -> str:
        """What this asks for and a job with this metadata does not do; empty if it does it all."""
        if kept.get(SETTINGS, self.settings) != self.settings:
            return "with other settings (config or --set)"
        fresh = [stage for stage in self.redo if stage not in kept.get(REDO, "").split()]
        return f"without --redo {' --redo '.join(fresh)}" if fresh else ""

    def command(self, *words: str) -> str:
        """A command line of `lorapar` for the job."""
        return shlex.join(["python", "-m", "lorapar_ray.cli", *words, *self.options, "--run-dir", self.run_dir])


class Jobs:
    """A cluster's job server."""

    def __init__(self, address: str | None) -> None:
        """Connect.

        Args:
            address: URL of the cluster's dashboard; None: `RAY_API_SERVER_ADDRESS`, the dashboard of the cluster that
                `RAY_ADDRESS` names, or this machine's.

        Raises:
            UserError: nothing answers, it is not Ray, or it requires another token.
        """
        given = address or os.environ.get(SERVER)
        if given and not given.startswith(URL):
            raise UserError(f"--address {given}: give the URL of the cluster's dashboard, such as {DEFAULT_ADDRESS}")
        self.address = given or os.environ.get(CLUSTER, "").strip() or DEFAULT_ADDRESS
        self._client = self._ask(self._connect)
        if not self.address.startswith(URL):
            self.address = str(self._client.get_address())
        if os.environ.get("RAY_AUTH_MODE") == "token" and self._asks_for_no_token():
            print(f"lorapar: the cluster at {self.address} {NOT_ASKED}", file=sys.stderr)

    def _asks_for_no_token(self) -> bool:
        """Only if the server says so: older ones do not."""
        url = f"{self.address.rstrip('/')}/api/authentication_mode"
        with suppress(Exception), urlopen(url, timeout=CONNECT_TIMEOUT_S) as answer:
            return bool(json.load(answer)["authentication_mode"] == "disabled")
        return False

    def _connect(self) -> Any:
        from ray.job_submission import JobSubmissionClient

        for name in CHATTY:
            logging.getLogger(name).setLevel(logging.WARNING)
        with _variable(SERVER, self.address):
            return JobSubmissionClient(self.address)

    def _ask(self, call: Callable[[], T]) -> T:
        try:
            return in_a_thread(call, name="asking the job server", timeout_s=CONNECT_TIMEOUT_S)
        except Exception as error:  # requests, aiohttp and Ray each have their own, and a proxy any answer
            said = one_line(error, 160) or type(error).__name__
            if refused(error) or REFUSED.match(str(error)):
                raise UserError(f"the cluster at {self.address} {NOT_ACCEPTED}") from error
            raise UserError(
                f"no Ray job server at {self.address} ({said}); --address takes the URL of the cluster's dashboard"
            ) from error

    def check(self, handed: Submission) -> None:
        """Check in a short separate job whether every node can run this, and show the reports.

        Raises:
            UserError: some cannot, or the job cannot be submitted.
        """
        job, _ = self._start(f"{handed.key}-check", self._known(), handed, handed.command("doctor", "--cluster"))
        status, why = self._follow(job)
        if status != "SUCCEEDED":
            raise UserError(f"the cluster at {self.address} cannot run this ({why}); --no-check skips this check")

    def submit(self, handed: Submission, *, check: bool = False) -> str:
        """Submit the run, unless a job of the same run is already running; returns the submission id.

        Args:
            check: check every node first. A running job is followed without: it has passed, and needs the nodes' room.

        Raises:
            UserError: the running job does something else, some node cannot run this, the working directory cannot be
                sent, or the server refuses the job.
        """
        known = self._known()
        running = _running(handed, handed.key, known)
        if running is None and check:
            self.check(handed)
            known = self._known()
            running = _running(handed, handed.key, known)
        job, fresh = running, False
        if job is None:  # the number of the new job comes from the same list: two submissions ask for the same one
            redo = [word for stage in handed.redo for word in ("--redo", stage)]
            job, fresh = self._start(handed.key, known, handed, handed.command("run", *redo))
        print(f"{'submitted' if fresh else 'following'} {job} at {self.address}", flush=True)
        return job

    def wait(self, job: str) -> None:
        """Show the log of a job until it ends.

        Raises:
            UserError: it has failed; gives the reason.
        """
        status, why = self._follow(job)
        if status != "SUCCEEDED":
            raise UserError(f"{job}: {status.lower()} ({why}); the same command resumes")

    def _known(self) -> dict[str, Any]:
        """Ray's `JobDetails` by submission id."""
        return {job.submission_id: job for job in self._ask(self._client.list_jobs) if job.submission_id}

    def _start(self, key: str, known: Mapping[str, Any], handed: Submission, command: str) -> tuple[str, bool]:
        """Submit a job; returns its id, and False if the server has had it since `known` (see `_meanwhile`).

        Raises:
            UserError: the server refuses it, or has another one that does something else.
        """
        environment = {
            "working_dir": str(handed.working_dir),
            "excludes": NOT_SENT,
            "env_vars": {WAIT: JOB_WAIT_S},
        }
        attempt = max((_number(key, job) for job in _attempts(key, known)), default=0) + 1
        wanted = key if attempt == 1 else f"{key}-{attempt}"

        def submit() -> str:
            return str(
                self._client.submit_job(
                    entrypoint=command, submission_id=wanted, runtime_env=environment, metadata=handed.metadata
                )
            )

        deadline = time.monotonic() + AGENT_LIMIT_S
        while True:
            try:
                return in_a_thread(submit, name="submitting the job", timeout_s=SUBMIT_TIMEOUT_S), True
            except (RuntimeError, ValueError, OSError, TimeoutError) as error:
                if (there := self._meanwhile(handed, key, wanted)) is not None:
                    return there, False
                if NO_AGENT not in str(error) or time.monotonic() > deadline:
                    raise UserError(f"{self.address} does not accept the job: {one_line(error, 300)}") from error
            time.sleep(AGENT_RETRY_S)

    def _meanwhile(self, handed: Submission, key: str, wanted: str) -> str | None:
        """After a submission that failed: the job of another command that was faster, or ours if only the answer was
        lost. It may have ended already.

        Raises:
            UserError: it does not do what is asked for now, or the server no longer answers.
        """
        now = self._known()
        if (running := _running(handed, key, now)) is not None:
            return running
        return wanted if wanted in now and not handed.not_in(now[wanted].metadata or {}) else None

    def _follow(self, job: str) -> tuple[str, str]:
        """Show a job's log as it grows; returns its final status and, in one line, why it failed."""
        log = JobLog(lambda line: print(line, flush=True))
        ended = followed(self._client, job, log)
        return ended.status.value, log.cause or why_ended(ended)


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    """Another value of an environment variable of this process, for a while."""
    usual = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if usual is None:
            del os.environ[name]
        else:
            os.environ[name] = usual


def _running(handed: Submission, key: str, known: Mapping[str, Any]) -> str | None:
    """The job that has not ended, of those that begin with `key`.

    Args:
        known: Ray's `JobDetails` by submission id.

    Raises:
        UserError: it does not do what is asked for now.
    """
    for job in _attempts(key, known):
        if known[job].status.value in FINAL:
            continue
        if other := handed.not_in(known[job].metadata or {}):
            raise UserError(
                f"{job} works on this run already, {other}; wait for it, or end it with `ray job stop {job}`, and "
                f"submit again; `ray job logs --follow {job}` shows it"
            )
        return job
    return None


def _attempts(key: str, known: Iterable[str]) -> list[str]:
    """The jobs of one run: the first is called by its key, later ones have a number."""
    return [each for each in known if _number(key, each)]


def _number(key: str, job: str) -> int:
    """Which job of a run this is, from 1; 0 if it is another's: a submission id may be any text, digits alone too."""
    if job == key:
        return 1
    number = job.removeprefix(f"{key}-")
    return int(number) if number != job and number.isdecimal() else 0


def in_working_dir(config: Path, given: Path | None) -> tuple[Path, Path]:
    """The directory to send (None: this one), and the config's place in it.

    Raises:
        UserError: the config lies outside of it, so the job would not find it.
    """
    root = (given or Path.cwd()).resolve()
    if not root.is_dir():
        raise UserError(f"--working-dir '{root}': no such directory")
    try:
        return root, config.resolve().relative_to(root)
    except ValueError:
        raise UserError(
            f"--config '{config}': lies outside the working directory '{root}', and the job gets only that; copy it "
            "there, or choose another --working-dir"
        ) from None


def require_whole_path(place: str, option: str = "--run-dir") -> None:
    """Check an option's directory for results: a job begins in a copy of the working directory, of which each machine
    has its own.

    Raises:
        UserError: it would lie in one machine's copy, or is not in a known store.
    """
    where = place_of(place)
    if isinstance(where, Path) and not where.is_absolute():
        raise UserError(
            f"{option} '{place}': give its whole path, on storage that every node reaches; a job's own directory "
            "is deleted when the job ends"
        )


def require_no_secret(words: Sequence[str]) -> None:
    """Check a job's command line, which the cluster's dashboard shows.

    Raises:
        UserError: it would hold a secret that this process knows.
    """
    for word in words:
        if redact(word) != word:
            raise UserError(
                f"--set {redact(word)}: the dashboard shows a job's command line; name an environment variable of the "
                "cluster instead (api_key_env)"
            )
