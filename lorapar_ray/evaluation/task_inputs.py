"""The user's files behind a task file of lm-eval: itself, what it includes, its functions and its data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from lorapar_ray.config import EvaluateConfig
from lorapar_ray.config_file import NOT_YAML

FUNCTION = "!function"
SUFFIXES = (".yaml", ".yml")


class _Function(str):
    """The text after `!function`: `utils.process_docs`."""


class _Loader(yaml.SafeLoader):
    """Reads lm-eval's tag without importing the function."""


_Loader.add_constructor(FUNCTION, lambda _, node: _Function(node.value))


def files_of(task: str) -> Iterator[str]:
    """The files that decide a task; none for lm-eval's own tasks, which go by their names.

    Args:
        task: an entry of `evaluate.tasks`.
    """
    name = task.partition("@")[0]
    if name.endswith(SUFFIXES):
        yield name
        yield from dict.fromkeys(str(each) for each in _behind(Path(name), set()))


def files_read(settings: EvaluateConfig) -> Iterator[str]:
    """The user's files behind all tasks: data, folders of task files, and task files with what they name."""
    yield from settings.data.values()
    yield from settings.include
    for task in settings.tasks:
        yield from files_of(task)


def _behind(file: Path, seen: set[Path]) -> Iterator[Path]:
    """Files that exist and that a task file names; nothing if it cannot be read, which the stage reports."""
    try:
        whole = file.expanduser().resolve()
        if whole in seen:
            return
        seen.add(whole)
        tree = yaml.load(whole.read_bytes(), Loader=_Loader)  # a SafeLoader
    except (OSError, RuntimeError, *NOT_YAML):
        return
    if not isinstance(tree, dict):
        return
    for text in _texts(tree):
        if isinstance(text, _Function):
            module = file.parent / f"{text.rpartition('.')[0].replace('.', '/')}.py"
            if _is_there(module):
                yield module
    for text in _texts(tree.get("include")):
        if _is_there(file.parent / text):
            yield file.parent / text
            yield from _behind(file.parent / text, seen)
    for text in _texts([tree.get("dataset_path"), tree.get("dataset_kwargs")]):
        if text and _is_there(Path(text)):
            yield Path(text)


def _is_there(path: Path) -> bool:
    try:
        return path.expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # too long for a path, or of an unknown user
        return False


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _texts(each)
