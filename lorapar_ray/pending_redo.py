"""A redo that was begun: it is in the manifest until the command that asked for it has ended well.

So it goes on after an interruption, with or without `--redo`: stages that were computed anew under it are kept, and
those that use their results may still be replaced.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace

from lorapar_ray import trash
from lorapar_ray.config import Config
from lorapar_ray.errors import UserError
from lorapar_ray.files import digest
from lorapar_ray.manifest import REDO
from lorapar_ray.pipeline import PIPELINE, dependents, stages_of, standings
from lorapar_ray.running import Redo
from lorapar_ray.runs import RunDirectory
from lorapar_ray.standing import recorded_settings


@dataclass(frozen=True)
class PendingRedo:
    """What `--redo` asked for, under the settings of its command."""

    id: str
    """Recorded with each of `stages` that was begun anew under it."""
    settings: str
    """Digest of the settings that change results."""
    stages: tuple[str, ...]
    """To be computed anew."""
    allowed: tuple[str, ...]
    """Stages of its command that may be replaced: these, and those that use their results."""

    def again(self, run: RunDirectory) -> list[str]:
        """The stages that are still to be begun anew."""
        return [name for name in self.stages if run.entry(name).get(REDO) != self.id]

    def how(self, run: RunDirectory, name: str) -> Redo:
        """What a stage's results may be replaced for."""
        if name in self.again(run):
            return "yes"
        return "if_changed" if name in self.allowed else "no"

    def id_for(self, name: str) -> str:
        """What is recorded with a stage that runs under it; empty if it is not one of `stages`."""
        return self.id if name in self.stages else ""


NOTHING = PendingRedo("", "", (), ())
"""No redo."""


def redo_of(config: Config, run: RunDirectory, stages: Sequence[str], asked: Collection[str]) -> PendingRedo:
    """The redo that a command works under; nothing is written.

    Args:
        stages: what the command runs.
        asked: its `--redo`. One that was begun under the same settings goes on; under other settings a new one replaces
            it, and a command without `--redo` leaves it alone. Without `--redo` it goes on if a stage was begun anew.
    """
    settings = digest({name: recorded_settings(PIPELINE[name], config) for name in stages_of(config)})
    known = run.manifest().get(REDO)
    begun = NOTHING
    if known is not None and known["settings"] == settings:
        names, allowed = (
            tuple(name for name in stages_of(config) if name in known[key]) for key in ("stages", "allowed")
        )
        begun = PendingRedo(known["id"], settings, names, allowed)
    if not asked:
        return begun if _begun(begun, run) else NOTHING
    may = {*asked, *dependents(config, asked)}
    return replace(
        begun,
        id=begun.id or uuid.uuid4().hex,
        settings=settings,
        stages=tuple(dict.fromkeys((*begun.stages, *asked))),
        allowed=tuple(dict.fromkeys((*begun.allowed, *(name for name in stages if name in may)))),
    )


@contextmanager
def recorded(redo: PendingRedo, config: Config, run: RunDirectory, stages: Sequence[str]) -> Iterator[None]:
    """Keep a redo in the manifest while the block runs `stages`, and after it if it has not ended well.

    If it ended before any stage was begun anew, all is as before, and the redo is forgotten.
    """
    if redo == NOTHING:
        yield
        return
    run.keep_redo(asdict(redo))
    try:
        yield
    except BaseException:
        with suppress(UserError, OSError):  # of a full disk, or of another command that has taken the run over
            if run.root.is_dir() and not _begun(redo, run):
                run.keep_redo(None)
        raise
    if _complete(redo, config, run, stages):
        run.keep_redo(None)


def _begun(redo: PendingRedo, run: RunDirectory) -> bool:
    """Whether a stage was begun anew under it, also if its files are in the trash now."""
    aside = (entry for name in redo.stages for entry in trash.in_trash(run, name).values())
    return redo.again(run) != list(redo.stages) or any(entry.get(REDO) == redo.id for entry in aside)


def _complete(redo: PendingRedo, config: Config, run: RunDirectory, ran: Sequence[str]) -> bool:
    """Whether nothing of it is left after `ran`; stages may also have run one by one."""
    left = [name for name in redo.allowed if name not in ran and not PIPELINE[name].is_view]
    if not left:
        return True
    found, again = standings(config, run), redo.again(run)
    return all(found[name].state == "done" and name not in again for name in left)
