"""Tasks by name: lm-eval's own, ours (additional or as replacements), and a user's task files.

Ours (the folder `tasks/`): SVAMP, MAWPS, BoolQ without its passages; and HumanEval and MBPP instead of lm-eval's, so
that no program of a model runs in this process. Other tasks that would run programs here are refused.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import lm_eval.api.task
import lm_eval.tasks
from jinja2 import UndefinedError
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._index import Entry, TaskIndex
from lm_eval.tasks._yaml_loader import load_yaml

from lorapar_ray.boundary import boundary
from lorapar_ray.errors import UserError
from lorapar_ray.evaluation.harness.local_data import FAMILIES, family_of, local_dataset, split_files
from lorapar_ray.files import expanded

OUR_TASKS = Path(__file__).parent / "tasks"
HARNESS = Path(lm_eval.tasks.__file__).parent
USUAL = ("gsm8k", "mmlu/default", "arc", "super_glue/boolq")
"""lm-eval's folders of the tasks that the paper and its peers report."""
SANDBOXED = frozenset({"humaneval", "mbpp"})
"""Our tasks that run a model's programs."""
LOCAL_ONLY = frozenset({"mawps"})
"""Our tasks without supported data on the hub."""
OTHER_SPLITS = ("training_split", "validation_split", "fewshot_split")
NEAREST = 3
LOGGER = "lm_eval"


@dataclass(frozen=True)
class Wanted:
    """A requested task."""

    text: str
    """`NAME` or `NAME@SHOTS`; also the name of its results."""
    name: str
    """A task, group or tag of the catalogue, or a task file."""
    shots: int | None
    """Examples in the prompt; None: the task's own number."""


def wanted(text: str) -> Wanted:
    """Parse `gsm8k`, `gsm8k@8` or `my_task.yaml@0`.

    Raises:
        UserError: the text after the @ is not a number.
    """
    name, at, shots = text.partition("@")
    if not name or (at and not shots.isdecimal()):
        raise UserError(f"evaluate.tasks: '{text}' is not a task; write NAME, or NAME@SHOTS such as gsm8k@8")
    return Wanted(text, name, int(shots) if at else None)


class Catalogue:
    """Finds tasks and loads them."""

    def __init__(self, data: Mapping[str, str] | None = None, include: Sequence[str] = ()) -> None:
        """Read the names of all tasks; none is loaded yet.

        Args:
            data: a file or folder instead of the hub's, by family (see `local_data`).
            include: folders of a user's task files.

        Raises:
            UserError: a family or a folder is unknown.
        """
        self._data = dict(data or {})
        if unknown := [family for family in self._data if family not in FAMILIES]:
            raise UserError(
                f"evaluate.data: '{unknown[0]}' cannot be given as a file; these can: {', '.join(FAMILIES)}"
            )
        if missing := [folder for folder in include if not expanded(folder).is_dir()]:
            raise UserError(f"evaluate.include: no such folder '{missing[0]}'")
        self._own = [OUR_TASKS, *(expanded(folder) for folder in include)]
        self._manager = self._managed([*(HARNESS / folder for folder in USUAL), *self._own])

    def _managed(self, folders: Sequence[Path], everything: bool = False) -> TaskManager:
        with quiet():
            manager = TaskManager(include_path=[str(folder) for folder in folders], include_defaults=everything)
        manager._factory = _Factory(self._data)
        return manager

    def _require(self, name: str) -> None:
        """Find `name` among the usual tasks, else among lm-eval's 13,000, whose names take it 15 s to read."""
        if name not in self._manager.task_index:
            self._manager = self._managed(self._own, everything=True)
        if name not in self._manager.task_index:
            near = difflib.get_close_matches(name, self._manager.all_tasks, NEAREST, cutoff=0.5)
            hint = f"did you mean {', '.join(near)}?" if near else "`lorapar lm-eval ls tasks` lists them"
            for file in (each for folder in self._own for each in sorted(folder.rglob("*.yaml"))):
                with boundary(f"evaluate.tasks: no task '{name}', and '{file}' is no task file", hint):
                    load_yaml(file, resolve_func=False)  # lm-eval silently skips such a file
            raise UserError(f"evaluate.tasks: no task '{name}'; {hint}")

    def _refuse_unsafe(self, entry: Entry | None) -> None:
        """lm-eval's own tasks for code download their program runner when they are loaded, and run programs in this
        process."""
        members = [] if entry is None else [entry, *(self._manager.task_index[name] for name in sorted(entry.tags))]
        for each in members:
            config = (each.cfg or {}) if each.yaml_path is None else load_yaml(each.yaml_path, resolve_func=False)
            if config.get("unsafe_code"):
                raise UserError(
                    f"evaluate.tasks: '{each.name}' runs a model's programs in this process, which is refused; "
                    "humaneval and mbpp run them in the sandbox"
                )

    def load(self, task: Wanted) -> dict[str, Any]:
        """The task, or those of a group or a tag, with their data: {tasks, groups, group_map} as lm-eval has them.

        Raises:
            UserError: there is no such task (with the nearest names), its data is missing or lacks a column, or it
                would run a model's programs in this process.
        """
        file = expanded(task.name)
        is_file = file.suffix in (".yaml", ".yml")
        if is_file and not file.is_file():
            raise UserError(f"evaluate.tasks: no such task file '{task.name}'")
        if not is_file:
            self._require(task.name)
        with boundary(f"evaluate.tasks: '{task.name}' is not a task file of lm-eval"):
            entry = TaskIndex.entry_from_path(file) if is_file else self._manager.task_index[task.name]
            self._refuse_unsafe(entry)
        fix = "check its data: evaluate.data (--data) names local files, else it comes from the hub"
        with quiet(), boundary(f"evaluate.tasks: '{task.name}' cannot be loaded", fix):
            try:
                loaded: dict[str, Any] = dict(self._manager.load([str(file) if is_file else task.name]))
            except UndefinedError as error:  # the templates are tried on the first question
                raise UserError(
                    f"evaluate.tasks: '{task.name}' reads a column that its data lacks ({error.message}); {fix}"
                ) from error
        for name, each in loaded["tasks"].items():
            _require_split(name, each)
            _set_shots(each, task)
        return loaded


def _require_split(name: str, task: Any) -> None:
    split = task.config.test_split or task.config.validation_split
    if task.dataset is not None and split not in task.dataset:
        has = ", ".join(task.dataset) or "none"
        raise UserError(f"evaluate.tasks: '{name}' reads the split '{split}', which its data lacks; it has {has}")


def _set_shots(task: Any, wanted: Wanted) -> None:
    shots = (task.get_config("num_fewshot") if wanted.shots is None else wanted.shots) or 0
    task.set_config(key="num_fewshot", value=shots)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)
    config = task.config
    evaluated = config.test_split or config.validation_split
    sources = {config.fewshot_split, config.training_split, config.validation_split} - {None, evaluated}
    if shots and not config.fewshot_config.samples and not sources:  # lm-eval would show test questions as examples
        raise UserError(
            f"evaluate.tasks: '{wanted.text}' shows {shots} examples, and its data has none beside the test questions; "
            f"add a file of its training or development split, or ask for {wanted.name}@0"
        )


FEWSHOT_SEED = 1234
"""lm-eval's own default."""


class _Factory(TaskFactory):
    """lm-eval's loader, which reads local files instead of the hub if they are given."""

    def __init__(self, data: Mapping[str, str]) -> None:
        super().__init__()
        self._data = data

    def _load_full_config(self, entry: Entry, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
        config = super()._load_full_config(entry, overrides)
        family = family_of(config)
        if family in LOCAL_ONLY and family not in self._data:
            raise UserError(f"evaluate.data.{family}: is not on the hub; give a file, --data {family}=FILE")
        if family is not None and family in self._data:
            evaluated = config.get("test_split") or config["validation_split"]
            there = split_files(family, self._data[family], evaluated)
            config |= {name: None for name in OTHER_SPLITS if config.get(name) not in (None, *there)}
            name = config.get("dataset_name") if family == "mmlu" else None
            config["custom_dataset"] = partial(local_dataset, family, self._data[family], evaluated, name)
        return config


@contextmanager
def quiet() -> Iterator[None]:
    """lm-eval without log messages and progress bars for each task (MMLU has 57): only errors."""
    logger, bar = logging.getLogger(LOGGER), lm_eval.api.task.tqdm
    before, silent = logger.level, datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    lm_eval.api.task.tqdm = lambda items, **_: items
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(before)
        lm_eval.api.task.tqdm = bar
        if not silent:
            datasets.enable_progress_bars()
