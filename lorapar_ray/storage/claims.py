"""One command at a time has a run in an object store, without a lock, a rename or a conditional write.

Each command that wants the run writes a claim of its own, `lock/<token>.json`, and then lists them all. If another
claim lives, it takes its own away. Listings of S3 and GCS show every write that was answered before, so of two commands
at least one sees the other: never do both go on. Who has the run writes its claim again every `BEAT_S`.

A claim is as old as the store's own clock says, compared with the claim that was just written: no machine's clock
matters. A holder that could not write for `FENCE_S`, asleep or cut off, has lost the run by its own measure before any
other can take it.
"""

from __future__ import annotations

import json
import random
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from lorapar_ray.errors import UserError
from lorapar_ray.progress import console
from lorapar_ray.run_lock import BEAT_S, RETRY_S, STALE_S, InUse, identity, lives, parsed
from lorapar_ray.storage.objects import Objects
from lorapar_ray.threads import stop_this_command

FOLDER = "lock"
FENCE_S = 0.8 * STALE_S
BOTH_S = (0.2, 2.0)
"""Two that claim at the same moment both step back, and try again after a random time between these."""
ROUNDS = 8


class Claim:
    """A command's claim to a run."""

    def __init__(self, objects: Objects) -> None:
        """`objects`: of the run, with a patience much shorter than `FENCE_S`."""
        self._objects = objects
        self._name = f"{FOLDER}/{uuid.uuid4().hex}.json"
        self._seen = 0.0
        self._lost = False

    @contextmanager
    def held(self, wait_s: float = 0.0) -> Iterator[None]:
        """Have the run while the block runs.

        Args:
            wait_s: for a holder to end, or to be seen to have died.

        Raises:
            UserError: another command has it; the message names it.
        """
        self._take_within(wait_s)
        stop = threading.Event()
        beat = threading.Thread(target=self._beat, args=(stop,), daemon=True, name="claim")
        beat.start()
        try:
            yield
        finally:
            stop.set()
            beat.join()  # or it would write again what is deleted here
            if not self._lost:
                with suppress(UserError):
                    self._objects.delete([self._name])

    def require(self) -> None:
        """Check that no other command can have taken the run.

        Raises:
            UserError: one may; what this process would write now could be another's.
        """
        if self._lost or _now() - self._seen > FENCE_S:
            raise UserError(f"'{self._objects.uri}' was taken over by another command or cut off; this one stops")

    def _take_within(self, wait_s: float) -> None:
        deadline, rounds, said = time.monotonic() + wait_s, 0, False
        while True:
            began = _now()
            holder = self._try()
            if holder is None:
                self._seen = began
                return
            rounds += 1
            if holder["holds"]:
                refusal = InUse(_refusal(self._objects, holder))
                if time.monotonic() > deadline:
                    raise refusal
                if not said:
                    console.print(f"  waiting up to {wait_s:g} s: {refusal}")
                said = True
                time.sleep(RETRY_S)
            elif rounds > ROUNDS:
                raise InUse(_refusal(self._objects, holder))
            else:
                time.sleep(random.uniform(*BOTH_S))

    def _try(self) -> dict[str, Any] | None:
        """Claim the run; None if this process has it now, else who has it or claims it too."""
        self._write(holds=False)
        claims = self._objects.listing(FOLDER)
        if (mine := claims.pop(self._name, None)) is None:  # someone has deleted it
            return {"holds": False, "age": 0.0, "claim": self._name}
        dead = []
        for name, stamp in claims.items():
            age = (mine.mtime_ns - stamp.mtime_ns) / 1e9
            holder = parsed((self._objects.read(name) or b"").decode(errors="replace"))
            if lives(holder, age):
                self._objects.delete([self._name])
                return {**holder, "holds": holder.get("holds", True), "age": age, "claim": name}
            dead.append(name)
        self._objects.delete(dead)
        self._write(holds=True)
        return None

    def _write(self, *, holds: bool) -> None:
        self._objects.write(self._name, json.dumps(identity() | {"holds": holds}).encode())

    def _beat(self, stop: threading.Event) -> None:
        while not stop.wait(BEAT_S):
            began = _now()
            if began - self._seen <= FENCE_S:
                try:
                    if self._objects.read(self._name) is not None:
                        self._write(holds=True)
                        self._seen = began
                        continue
                except UserError:  # cut off: perhaps not for long
                    continue
            self._lost = True
            print(f"lorapar: '{self._objects.uri}' was taken over or cut off; this command stops", file=sys.stderr)
            stop_this_command()
            return


def living_claim(objects: Objects) -> dict[str, Any] | None:
    """Who has a run, for those who only look: here this machine's clock has to do."""
    for name, stamp in objects.listing(FOLDER).items():
        holder = parsed((objects.read(name) or b"").decode(errors="replace"))
        if holder.get("holds") and lives(holder, time.time() - stamp.mtime_ns / 1e9):
            return holder
    return None


def _refusal(objects: Objects, holder: dict[str, Any]) -> str:
    pid, host, command, since = (str(holder.get(key, "?"))[:80] for key in ("pid", "host", "command", "since"))
    return (
        f"'{objects.uri}' is in use by process {pid} on {host} ({command}, since {since}, last sign of life "
        f"{max(0.0, holder['age']):.0f} s ago); wait for it or stop it, or delete '{objects.uri}/{holder['claim']}' if "
        "it is gone"
    )


def _now() -> float:
    """Seconds that a machine that sleeps counts too."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
