"""One command at a time holds a run in an object store, without a lock, a rename or a conditional write.

Each command writes its own claim, `lock/<token>.json`, and then lists all claims. If another claim is alive, the
command deletes its own. Listings of S3 and GCS show every completed write, so of two commands at least one sees the
other: the two never both continue. The holder rewrites its claim every `BEAT_S`.

A claim's age is its distance from the claim that was just written, by the store's clock: no machine's clock matters. A
holder that could not write for `FENCE_S` (suspended or cut off) gives up the run before any other command can take it:
each of its requests to the run, and each retry of one, first asks `Claim.require`.
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
from lorapar_ray.run_lock import RETRY_S, STALE_S, InUse, identity, in_use, lives, parsed
from lorapar_ray.storage.objects import Objects
from lorapar_ray.threads import stop_this_command

FOLDER = "lock"
BEAT_S = 20.0
FENCE_S = 0.8 * STALE_S
BOTH_S = (0.2, 2.0)
"""If two commands claim at the same moment, both withdraw and retry after a random time in this range."""
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
        """Hold the run while the block runs.

        Args:
            wait_s: how long to wait until the holder ends or is seen to be dead.

        Raises:
            UserError: another command holds it; the message names it.
        """
        self._take_within(wait_s)
        stop = threading.Event()
        beat = threading.Thread(target=self._beat, args=(stop,), daemon=True, name="claim")
        beat.start()
        try:
            yield
        finally:
            stop.set()
            beat.join()  # else it could rewrite the claim that is deleted here
            if not self._lost:
                with suppress(UserError):
                    self._objects.delete([self._name])

    def require(self) -> None:
        """Check that no other command can have taken the run over.

        Raises:
            UserError: one may have; this process must not write to the run any more.
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
        """Claim the run; None if this process holds it now, else its holder or the other claimant."""
        self._write(holds=False)
        claims = self._objects.listing(FOLDER)
        if (mine := claims.pop(self._name, None)) is None:  # deleted by a user
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
                except UserError:  # cut off, perhaps only briefly
                    continue
            self._lost = True
            print(f"lorapar: '{self._objects.uri}' was taken over or cut off; this command stops", file=sys.stderr)
            stop_this_command()
            return


def living_claim(objects: Objects) -> dict[str, Any] | None:
    """The holder of a run, for commands that only read; age is measured by this machine's clock."""
    for name, stamp in objects.listing(FOLDER).items():
        holder = parsed((objects.read(name) or b"").decode(errors="replace"))
        if holder.get("holds") and lives(holder, time.time() - stamp.mtime_ns / 1e9):
            return holder
    return None


def _refusal(objects: Objects, holder: dict[str, Any]) -> str:
    return in_use(f"'{objects.uri}'", holder, holder["age"], f"{objects.uri}/{holder['claim']}")


def _now() -> float:
    """Monotonic seconds, including the time the machine was suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
