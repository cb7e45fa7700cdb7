"""A stage: one object with its name, inputs, outputs, processes, and its function.

Each folder of a stage has a `stage.py` with its object, and `lorapar_ray.pipeline` puts them in order. These modules
import nothing heavy, so that a finished run is detected within a second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorapar_ray.config import Config, Section
from lorapar_ray.config.marks import Setting, deciding
from lorapar_ray.files import finished_files
from lorapar_ray.gpus import RULES
from lorapar_ray.processes import Groups, Part, groups_of, in_words
from lorapar_ray.runs import RunDirectory

Settings = dict[str, Setting]
OUTPUTS_FOR = "outputs_for"
"""A stage's note for the manifest: by later stage, the digest of what that one reads, if it is less than all."""


def _nothing(_: Config) -> None:
    return None


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline. Paths are relative to the run directory; `{name}` in them is the run's name."""

    name: str
    help: str
    """For the command line."""
    needs: Callable[[Config], tuple[str, ...]]
    """Stages that must have finished, and whose results enter."""
    settings: Callable[[Config], Settings]
    """The config fields that change the result, by path."""
    run: Callable[[Config, RunDirectory], dict[str, Any]]
    """Does the work, continuing from partial results; returns notes for the manifest."""
    outputs: tuple[str, ...]
    """Folders and files of the result, checked before they are relied on."""
    passed_on: tuple[str, ...] | None = None
    """The outputs that later stages read; None: all."""
    traces: tuple[str, ...] = ()
    """Curves, samples and rejected rows."""
    scratch: tuple[str, ...] = ()
    """Partial results; not needed once the stage is done."""
    unused: Callable[[Config], Iterable[str]] = lambda _: ()
    """Paths of `settings`, or the beginnings of some, that change nothing beside this config's other settings. They are
    recorded, but not compared; a setting that brings them into use is."""
    reads: Callable[[Config], Iterable[str]] = lambda _: ()
    """The user's own files and folders whose contents decide the result."""
    processes: Callable[[Config], Iterable[Part]] = lambda _: ()
    """What it runs at the same time on the cluster; nothing: it works in the driver alone."""
    lowered_by: str = ""
    """The setting to lower if the processes have no room; empty: the number of the first ones."""
    uses_ray: Callable[[Config], bool] = lambda _: True
    check: Callable[[Config], None] = _nothing
    """Finds errors that would stop the stage late; raises UserError."""
    check_there: Callable[[Config], None] = _nothing
    """The same on the nodes, once Ray runs: of the student, which the driver need not have, and of keys."""
    is_view: bool = False
    """It only shows what the run holds: it may be written again at any time, without `--redo`."""

    def groups(self, config: Config) -> Groups:
        """What the cluster must have room for while the stage runs.

        Args:
            config: with numbers for `gpus: auto`, as `gpus.place` gives it for this stage.
        """
        return groups_of(self.processes(config))

    def resources(self, config: Config) -> str:
        """What it asks for, in words; empty: nothing."""
        return in_words(self.processes(config), RULES.get(self.name, ""))

    def owned(self, run: RunDirectory, name: str) -> list[Path]:
        """Everything of this stage that there is in a run called `name`."""
        every = [run.root / each.format(name=name) for each in (*self.outputs, *self.traces, *self.scratch)]
        return [path for path in every if path.exists() or path.is_symlink()]

    def output_files(self, run: RunDirectory, places: tuple[str, ...] | None = None) -> list[Path]:
        """The finished files of its result, or of some `places` of it."""
        found: list[Path] = []
        for place in self.outputs if places is None else places:
            path = run.root / place
            found += [path] if path.is_file() else finished_files(path)
        return sorted(found)


def settings_of(config: Config, *names: str) -> Settings:
    """The deciding settings of some parts of a config; the seed is always one."""
    found: Settings = {"seed": Setting(config.seed, False)}
    for name in names:
        part = getattr(config, name)
        found |= deciding(part, name) if isinstance(part, Section) else {name: Setting(part, False)}
    return found


def model_files(path: str) -> tuple[str, ...]:
    """A model as something that a stage reads: nothing for a hub name or a package, which go by their names."""
    return () if path.startswith("package:") else (path,)


def before(config: Config, stage: str) -> tuple[str, ...]:
    """What a training stage needs: the cut, and the training stages that `order` puts before it."""
    return ("label", "score", "partition", *_until(config, stage)[:-1])


def order_until(config: Config, stage: str) -> Settings:
    """`order` as far as a training stage: what comes after it does not matter to it."""
    return {"order": Setting(_until(config, stage), False)}


def _until(config: Config, stage: str) -> list[str]:
    order: list[str] = list(config.order)
    return order[: order.index(stage) + 1] if stage in order else [stage]
