"""A run's YAML file and overrides as a checked `Config`, and one clear line for whatever is wrong with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from lorapar_ray.config import Config
from lorapar_ray.errors import UserError


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML config and apply `section.key=value` overrides (values are YAML; lists are indexed by number).

    Raises:
        UserError: no such file, not YAML, or a field that is unknown, of the wrong type or out of range.
    """
    if not path.is_file():
        raise UserError(f"config '{path}': no such file")
    try:
        tree = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise UserError(f"config '{path}': not valid YAML ({_one_line(error)})") from error
    if not isinstance(tree, dict):
        raise UserError(f"config '{path}': expected a mapping of sections, got {type(tree).__name__}")
    for override in overrides:
        _apply(tree, override)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"config '{path}': {_first_problem(error)}") from error


def _apply(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"--set '{override}': write it as section.key=value")
    node: Any = tree
    *parents, leaf = key.split(".")
    try:
        for part in parents:
            node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
        node[int(leaf) if isinstance(node, list) else leaf] = yaml.safe_load(text)
    except (TypeError, ValueError, IndexError, AttributeError) as error:
        raise UserError(f"--set '{override}': the config has no '{key}'") from error
    except yaml.YAMLError as error:
        raise UserError(f"--set '{override}': the value is not valid YAML") from error


def _first_problem(error: ValidationError) -> str:
    problems = error.errors()
    first = problems[0]
    where = ".".join(str(part) for part in first["loc"]) or "top level"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if first["type"] == "extra_forbidden":
        return f"unknown field '{where}'; check the spelling{more}"
    got = "" if first["type"] == "missing" else f", got {first['input']!r}"
    return f"field '{where}': {first['msg']}{got}"[:300] + more


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
