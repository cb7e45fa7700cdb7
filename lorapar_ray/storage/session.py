"""The driver's side: one command's work on a run in an object store."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from lorapar_ray.errors import UserError
from lorapar_ray.files import cache_root
from lorapar_ray.progress import console
from lorapar_ray.run_lock import InUse, run_lock
from lorapar_ray.storage import COMPLETE, PROBE, TOKEN
from lorapar_ray.storage.claims import BEAT_S, FOLDER, Claim, living_claim
from lorapar_ray.storage.mirror import MANIFEST, Mirror, Wanted, all_but, below
from lorapar_ray.storage.objects import Objects
from lorapar_ray.storage.uris import Uri
from lorapar_ray.storage.workspace import Handed
from lorapar_ray.threads import meanwhile

SYNC_EVERY_S = 10.0
PARTIAL = ("work", "metrics")
"""Copied while a stage runs; results are copied when the stage publishes them."""
UNSEEN = ("trash", "work/label", "work/votes", "work/evaluate", "work/score", "work/sft", "work/grpo", "work/warmup")
"""Not needed to read a run's results."""
LAST = TOKEN
"""An object: the token of the last session that wrote. The mirror keeps its token in a file of this name."""


class RemoteRun:
    """A run in an object store, and this machine's mirror of it."""

    def __init__(self, uri: Uri, root: Path | None = None, seen: Wanted | None = None) -> None:
        """Sends no request yet.

        Args:
            root: of the mirror; None: this machine's permanent mirror, for commands that write to the run.
            seen: what `look` fetches; None: all but `UNSEEN`.
        """
        self._seen = seen or all_but(UNSEEN)
        key = hashlib.sha256(str(uri).encode()).hexdigest()[:16]
        self.uri, self.objects = uri, Objects(uri)
        self.root = cache_root().resolve() / "runs" / key if root is None else root
        self._mirror: Mirror | None = None
        self._claim: Claim | None = None
        self._shared: tuple[str, ...] = ()
        self._told = False
        """Whether the last try to sync failed, and was reported."""

    @contextmanager
    def at_work(self, wait_s: float = 0.0) -> Iterator[None]:
        """Hold the run, and keep its files in the mirror, while the block runs.

        Raises:
            UserError: another command holds it, or the store cannot be read or written.
        """
        self.objects.require_bucket()
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        claim = self._claim = Claim(Objects(self.uri, patience_s=BEAT_S))
        with self._alone_here(wait_s), claim.held(wait_s):
            self._take_over(self.objects.guarded(claim.require))
            self._told = False
            try:
                with meanwhile(self._try_to_sync, every_s=SYNC_EVERY_S):
                    yield
            finally:
                try:
                    self.publish()
                    (self.root / COMPLETE).touch()
                finally:
                    self._mirror = None

    def look(self) -> None:
        """Fill the mirror with the run's present content, even if another command holds the run.

        Raises:
            UserError: the store cannot be read.
        """
        if self._mirror is None:
            self.objects.require_bucket()
            self._mirror = Mirror(self.root, self.objects)
        if MANIFEST in self.objects.listing():
            self._mirror.pull(self._seen)

    def holder(self) -> dict[str, Any] | None:
        """The command that holds the run; None if there is none."""
        return living_claim(self.objects)

    def publish(self) -> None:
        """Copy every changed file to the store.

        Raises:
            UserError: it cannot be written to, or another command has taken the run over.
        """
        if self._mirror is not None and self._claim is not None:
            self._claim.require()
            self._mirror.push()

    @contextmanager
    def shared(self, writes: Sequence[str]) -> Iterator[Handed]:
        """Let workers read the run, and write `writes`, while the block runs; afterwards the mirror has what they
        wrote.

        Raises:
            UserError: the store cannot be read or written.
        """
        self.publish()
        self._shared = tuple(writes)
        try:
            yield Handed(self.uri, str(self.root), tuple(writes))
        finally:
            self._shared = ()
            if self._mirror is not None:
                self._mirror.pull(below(writes), look_closely=True)

    def remove(self, place: str) -> None:
        """Remove a folder of the store that no mirror contains.

        Raises:
            UserError: as `publish`.
        """
        objects = self.objects if self._mirror is None else self._mirror.objects
        objects.delete_folder(place)

    @contextmanager
    def _alone_here(self, wait_s: float) -> Iterator[None]:
        """Lock the mirror, which commands on one machine share."""
        with ExitStack() as held:
            try:
                held.enter_context(run_lock(self.root, wait_s))
            except InUse as error:
                raise InUse(str(error).replace(str(self.root), str(self.uri))) from error
            yield

    def _take_over(self, objects: Objects) -> None:
        """Make the mirror equal to the store, plus files that this machine's last session could not copy.

        Args:
            objects: of the run, guarded by the claim.
        """
        last = objects.read(LAST)
        token = self.root / TOKEN
        if last is None or not token.is_file() or token.read_bytes() != last:  # other sessions have written since
            for each in self.root.iterdir():
                if each.name != "lock.json":
                    shutil.rmtree(each) if each.is_dir() else each.unlink()
        there = {name.partition("/")[0] for name in objects.listing() if not name.startswith(PROBE)}
        if there - {FOLDER, LAST, "config.yaml"} and MANIFEST not in there:
            raise UserError(f"run directory '{self.uri}' is not empty and holds no {MANIFEST}; choose another")
        complete = self.root / COMPLETE
        self._mirror = Mirror(self.root, objects)
        self._mirror.pull(lambda _: True, restore=complete.is_file())
        complete.unlink(missing_ok=True)
        mine = uuid.uuid4().hex.encode()
        objects.write(LAST, mine)
        token.write_bytes(mine)

    def _try_to_sync(self) -> None:
        try:
            mirror, shared = self._mirror, self._shared
            if mirror is not None:
                if shared:
                    mirror.pull(below(shared))
                mirror.push(below(PARTIAL))
            self._told = False
        except UserError as error:
            if not self._told:
                console.print(f"  {error}; the stage continues and tries again")
            self._told = True


@contextmanager
def looked_at(uri: Uri, places: Sequence[str] = ()) -> Iterator[RemoteRun]:
    """A run's present content, in a temporary folder that is deleted after the block.

    Args:
        places: the files and folders to fetch; empty: all but `UNSEEN`.
    """
    with tempfile.TemporaryDirectory(prefix="lorapar-view-") as folder:
        run = RemoteRun(uri, Path(folder).resolve() / "run", below(places) if places else None)
        with suppress(FileNotFoundError):
            run.look()
        yield run
