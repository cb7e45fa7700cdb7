"""The run directory: the stages' files and manifest, written so that no incomplete file is ever read.

    runs/<name>/
      config.yaml  manifest.json      settings last used; per stage: status, what decided it, its files, seconds;
                                      a redo that has not ended yet
      data/{train,test}.parquet       the questions as the readers gave them
      labels/  rejects/  adapter/  scores/  partition/  sft/adapter/  grpo/adapter/  eval/  metrics/  report/
      sft/system2/adapter/            of a sequence of Systems, after System 2; after the last it is sft/adapter
      trash/<time>-<stage>/           results that are being replaced, until the stage has finished
      lock.json                       the one command that is at work here

Every file appears by an atomic rename, so a reader sees all of it or none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from lorapar_ray.config import Config, DataConfig
from lorapar_ray.errors import UserError
from lorapar_ray.files import atomic_path, write_json
from lorapar_ray.fingerprints import Fingerprints
from lorapar_ray.manifest import FORMAT, REDO, read_manifest
from lorapar_ray.run_lock import NAME as LOCK
from lorapar_ray.run_lock import living_holder, require_held, run_lock
from lorapar_ray.storage import OF_A_MIRROR, PROBE
from lorapar_ray.storage.uris import Uri, place_of

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from lorapar_ray.storage.session import RemoteRun
    from lorapar_ray.storage.workspace import Handed

PROGRESS = "progress.json"
"""In `work`: progress of the running stage."""


class RunDirectory:
    """Paths and manifest of one run.

    In an object store the paths are of a folder on this machine, which is filled by `at_work` and `looked_at`.
    """

    def __init__(self, place: Path | str, remote: RemoteRun | None = None) -> None:
        """A path may contain `~`, `..` and links; it is resolved.

        Args:
            place: a path, or the URI of a folder in an object store.
            remote: the latter's session; None: a new one.

        Raises:
            UserError: it cannot be resolved (unknown user, circular links); its name is not UTF-8; or it is not a URI
                of a known store.
        """
        root = place_of(place)
        self.remote: RemoteRun | None = remote
        if isinstance(root, Uri):
            from lorapar_ray.storage.session import RemoteRun

            self.remote = remote or RemoteRun(root)
            root = self.remote.root
        try:
            self.root = root = root.expanduser().resolve()
            str(root).encode()  # as Arrow and safetensors name files
        except (OSError, RuntimeError, UnicodeEncodeError) as error:
            raise UserError(f"run directory '{root}' cannot be followed ({error}); choose another") from error
        self.data = root / "data"
        self.labels = root / "labels"
        self.rejects = root / "rejects"
        self.adapter = root / "adapter"
        self.scores = root / "scores"
        self.partition = root / "partition"
        self.sft = root / "sft"
        self.grpo = root / "grpo"
        self.eval = root / "eval"
        self.metrics = root / "metrics"
        self.label_summary = self.metrics / "labels.json"
        self.report = root / "report"
        self.trash = root / "trash"
        self.work = root / "work"
        """Partial results of unfinished stages: units, checkpoints, caches. Safe to delete once a run is done."""

    @property
    def manifest_path(self) -> Path:
        return self.root / "manifest.json"

    @property
    def place(self) -> str:
        """The run's location, for messages."""
        return str(self.root if self.remote is None else self.remote.uri)

    def trained(self, name: str) -> Path:
        """The folder of one of `Config.trained`: of a stage, or of the adapter after a System of a sequence."""
        stage, _, system = name.partition("-")
        return self.root / stage / (f"system{system}" if system else "")

    def address(self, path: Path) -> str:
        """A path of the run as other machines see it."""
        if self.remote is None:
            return str(path.resolve())
        return str(self.remote.uri / str(path.relative_to(self.root)))

    @contextmanager
    def at_work(self, config: Config, wait_s: float = 0.0) -> Iterator[None]:
        """Open the run for `config` and lock it for this process while the block runs.

        Args:
            wait_s: how long to wait until another command leaves it.

        Raises:
            UserError: see `open`; or another command holds the run, or an object store does not answer.
        """
        with nullcontext() if self.remote is None else self.remote.at_work(wait_s):
            self.open(config)
            with run_lock(self.root, wait_s):
                (self.work / PROGRESS).unlink(missing_ok=True)  # of a killed process
                yield

    def shared(self, *writes: Path) -> AbstractContextManager[Handed | None]:
        """Let workers anywhere read the run, and write to some of its places, while the block runs.

        Yields:
            the argument of `storage.workspace.workspace` on their side; None on a shared disk.
        """
        if self.remote is None:
            return nullcontext()
        return self.remote.shared([str(path.relative_to(self.root)) for path in writes])

    def holder(self) -> dict[str, Any] | None:
        """The running command: pid, host, command, since; None if there is none."""
        return living_holder(self.root) if self.remote is None else self.remote.holder()

    def open(self, config: Config) -> None:
        """Create the directory for `config`, or check that it already belongs to it.

        A run may be resumed with other stage settings, but a directory of another model, other data or another name
        belongs to another run: mixing the two would make results that mean nothing.

        Raises:
            UserError: the directory belongs to another run, is in use, or cannot be created.
        """
        self.require_own(config)
        if self.manifest():
            return
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with run_lock(self.root):
                if self.manifest():  # another command was faster
                    self._require_same(self.manifest()["identity"], config)
                    return
                write_json(self.manifest_path, {"format": FORMAT, "identity": _identity(config), "stages": {}})
                self.keep_config(config)
            if self.remote is not None:
                self.remote.publish()
        except OSError as error:
            raise UserError(f"run directory '{self.root}' cannot be created: {error.strerror}") from error

    def require_own(self, config: Config) -> None:
        """Check that the directory belongs to `config`, or to no run yet; nothing is written.

        Raises:
            UserError: it belongs to another run, or holds something else.
        """
        if manifest := self.manifest():
            self._require_same(manifest["identity"], config)
            return
        try:
            foreign = self.root.is_dir() and any(not _of_opening(each) for each in self.root.iterdir())
        except OSError as error:
            raise UserError(f"run directory '{self.root}' cannot be read: {error.strerror}") from error
        if foreign and not self.manifest():  # else another command was faster
            raise UserError(f"run directory '{self.place}' is not empty and holds no manifest.json; choose another")

    def _require_same(self, known: dict[str, Any], config: Config) -> None:
        for key, value in _identity(config).items():
            if known.get(key) != value and not (key == "data" and _same_data(known.get(key), config.data)):
                raise UserError(
                    f"run directory '{self.place}' belongs to another config (its {key} differs); "
                    "choose another --run-dir or restore that setting"
                )

    def keep_config(self, config: Config) -> None:
        """Write the settings that a stage is about to use, as `config.yaml`."""
        with atomic_path(self.root / "config.yaml") as draft:
            draft.write_text(config.to_yaml(hide_secrets=True), encoding="utf-8")

    def manifest(self) -> dict[str, Any]:
        """The present manifest; empty before the first `open`.

        Raises:
            UserError: it is damaged, of a newer version, or cannot be read.
        """
        return read_manifest(self.manifest_path)

    def entry(self, stage: str) -> dict[str, Any]:
        """The manifest's entry of a stage; empty if there is none."""
        found: dict[str, Any] = self.manifest().get("stages", {}).get(stage, {})
        return found

    def record(self, stage: str, /, **entry: Any) -> None:
        """Replace `stage`'s entry in the manifest; without one, remove it.

        Raises:
            UserError: another command has taken the run over.
        """
        require_held(self.root)
        manifest = self.manifest()
        manifest["stages"].pop(stage, None)
        if entry:
            manifest["stages"][stage] = entry
        self._write(manifest)

    def keep_redo(self, redo: dict[str, Any] | None) -> None:
        """Replace the manifest's redo that was begun; None: there is none.

        Raises:
            UserError: another command has taken the run over.
        """
        require_held(self.root)
        manifest = self.manifest()
        before = manifest.pop(REDO, None)
        if redo is not None:
            manifest[REDO] = redo
        if redo != before:
            self._write(manifest)

    def _write(self, manifest: dict[str, Any]) -> None:
        write_json(self.manifest_path, manifest)
        if self.remote is not None:
            self.remote.publish()

    @cached_property
    def fingerprints(self) -> Fingerprints:
        """Digests of files that this run has read or written."""
        return Fingerprints(self.work / "digests.json")


def _of_opening(path: Path) -> bool:
    """Whether a file belongs to a mirror, or is left by a command that was killed while it checked or opened a run
    directory."""
    beginnings = (f".{LOCK}.", ".manifest.json.", ".config.yaml.", PROBE)
    return path.name in (LOCK, *OF_A_MIRROR) or path.name.startswith(beginnings)


@contextmanager
def looked_at(place: Path | str, *needed: str) -> Iterator[RunDirectory]:
    """A run to read, also while a command works in it. A run in an object store is read in its present state.

    Args:
        needed: the files and folders to read; none: everything about results.

    Raises:
        UserError: as `RunDirectory`, or an object store does not answer.
    """
    where = place_of(place)
    if not isinstance(where, Uri):
        yield RunDirectory(where)
        return
    from lorapar_ray.storage.session import looked_at as remote_looked_at

    with remote_looked_at(where, needed) as remote:
        yield RunDirectory(str(where), remote)


def _identity(config: Config) -> dict[str, Any]:
    return {"name": config.name, "model": config.model.path, "data": config.model_dump(mode="json")["data"]}


def _same_data(known: Any, data: DataConfig) -> bool:
    """Fields that did not exist when the run began have their defaults."""
    try:
        return DataConfig.model_validate(known) == data
    except ValidationError:
        return False
