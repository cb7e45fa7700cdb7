"""Reads a run's YAML file and overrides as a checked `Config`; errors are one clear line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from lorapar_ray.config import Config, Section
from lorapar_ray.errors import UserError
from lorapar_ray.redact import has_secret, remember_config
from lorapar_ray.text import one_line

LARGEST_TREE = 100_000
"""Most values in a config with expanded anchors: a few lines of anchors can expand to billions."""
PRIVATE = ("base_url", "extra_body", "api_key_env")
"""Fields whose values may contain a key; messages never show them."""
MERGE = "tag:yaml.org,2002:merge"
NOT_YAML = (yaml.YAMLError, ValueError, OverflowError, RecursionError)
"""What PyYAML raises: its own errors, and Python's for invalid dates and numbers, or too deep nesting."""


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML config and apply `section.key=value` overrides (values are YAML; lists are indexed by number).

    Raises:
        UserError: no such file, not YAML, a key given twice, or a field that is unknown, of the wrong type or out of
            range.
    """
    tree = read_yaml(path, f"config '{path}'")
    if not isinstance(tree, dict):
        raise UserError(f"config '{path}': expected a mapping of sections, got {type(tree).__name__}")
    _override(tree, overrides)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"config '{path}': {_first_problem(error)}") from error


def config_of_options(sections: Mapping[str, type[Section]], tree: dict[str, Any], overrides: Sequence[str]) -> Any:
    """Sections of a config that no file holds, from command line options and overrides: {name: section}.

    Raises:
        UserError: a field is unknown or out of range, or an override is about another section.
    """
    _override(tree, overrides)
    if apart := [name for name in tree if name not in sections]:
        raise UserError(f"--set '{apart[0]}': has no meaning here; known are {', '.join(sections)}")
    found = {}
    for name, section in sections.items():
        try:
            found[name] = section.model_validate(tree.get(name, {}))
        except ValidationError as error:
            raise UserError(f"{name}: {_first_problem(error)}") from error
    return found


def _override(tree: dict[str, Any], overrides: Sequence[str]) -> None:
    """Apply `section.key=value` overrides to a tree, and remember secrets that messages must not show."""
    _require_all_kept([each.partition("=")[0] for each in overrides])
    for override in overrides:
        key, _, value = override.partition("=")
        remember_config({key.rpartition(".")[2]: value})
        _apply(tree, override)
    remember_config(tree)


def _require_all_kept(keys: Sequence[str]) -> None:
    """A later override must not silently drop an earlier one.

    Raises:
        UserError: a key is given twice, or after a part of it (`sft` after `sft.epochs`).
    """
    for place, key in enumerate(keys):
        for earlier in keys[:place]:
            if earlier == key:
                raise UserError(f"--set '{key}': given twice; keep one")
            if earlier.startswith(f"{key}."):
                raise UserError(f"--set '{key}': would drop --set '{earlier}'; give it first")


def read_yaml(path: Path, what: str) -> Any:
    """The values of the user's YAML file, without shared objects.

    Raises:
        UserError: it is missing, unreadable, not UTF-8, not YAML, or gives a key twice.
    """
    if not path.is_file():
        raise UserError(f"{what}: no such file")
    try:
        return parse_yaml(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{what}: not UTF-8 at byte {error.start}; save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"{what}: cannot be read ({error.strerror})") from error
    except NOT_YAML as error:
        raise UserError(f"{what}: not valid YAML ({_yaml_problem(error)})") from error


def parse_yaml(text: str) -> Any:
    """YAML as plain values; an anchor that is used twice gives two copies, so that changing one does not change the
    other.

    Raises:
        ValueError: a key is given twice in one mapping, or anchors expand to too many values; and `NOT_YAML`.
    """
    return _copied(_parsed(text), [0])


@lru_cache(maxsize=64)
def _parsed(text: str) -> Any:
    """The values, with shared objects. A grid of arms reads the same config for each of them."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _require_keys_once(node, loader)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _require_keys_once(root: yaml.Node, loader: yaml.SafeLoader) -> None:
    """PyYAML would silently keep the last of two equal keys (`1` and `0x1`), and pydantic the last of `1` and
    `"01"`."""
    seen: set[int] = set()
    left: list[tuple[yaml.Node, str]] = [(root, "")]
    while left:
        node, where = left.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            lines: dict[str, int] = {}
            for key, value in node.value:
                name = _key_of(key, loader)
                line = key.start_mark.line + 1
                if name in lines and name:
                    raise ValueError(f"'{where}{name}' is given twice, in lines {lines[name]} and {line}; keep one")
                lines[name] = line
                left.append((value, f"{where}{name}."))
        elif isinstance(node, yaml.SequenceNode):
            left += [(item, f"{where}{index}.") for index, item in enumerate(node.value)]


def _key_of(node: yaml.Node, loader: yaml.SafeLoader) -> str:
    if not isinstance(node, yaml.ScalarNode):
        return ""
    return str(node.value) if node.tag == MERGE else _number_once(str(loader.construct_object(node)))


def _number_once(name: str) -> str:
    return (name.lstrip("0") or "0") if name.isdecimal() else name


def _copied(value: Any, count: list[int]) -> Any:
    count[0] += 1
    if count[0] > LARGEST_TREE:
        raise ValueError(f"its anchors stand for more than {LARGEST_TREE:,} values")
    if isinstance(value, dict):
        return {key: _copied(below, count) for key, below in value.items()}
    return [_copied(item, count) for item in value] if isinstance(value, list) else value


def _apply(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not all(key.split(".")):
        raise UserError(f"--set '{key}': write it as section.key=value")
    try:
        value = parse_yaml(text)
    except NOT_YAML as error:
        raise UserError(f"--set '{key}': the value is not valid YAML ({_yaml_problem(error)})") from error
    node: Any = tree
    section: type[Section] | None = Config
    *parents, leaf = key.split(".")
    try:
        for part in parents:
            place = _place(node, part)
            if isinstance(node, dict) and place not in node:
                node[place] = _default(section, part)
            node, section = node[place], _section(section, part)
        node[_place(node, leaf)] = value
    except (TypeError, ValueError, IndexError, AttributeError) as error:
        raise UserError(f"--set '{key}': the config has no such place") from error


def _place(node: Any, part: str) -> Any:
    """The key or index that `part` of an override means; Systems, for example, have numbers as keys."""
    if isinstance(node, list):
        if not part.isdecimal() or part != _number_once(part):  # `01` and `1` would be two names of one field
            raise IndexError(part)
        return int(part)
    numbered = part.isdecimal() and part not in node and any(isinstance(key, int) for key in node)
    if numbered and part != _number_once(part):
        raise IndexError(part)
    return int(part) if numbered else part


def _section(section: type[Section] | None, field: str) -> type[Section] | None:
    """The class of a section within a section; None for anything else."""
    default = None if section is None or field not in section.model_fields else section.model_fields[field].annotation
    return default if isinstance(default, type) and issubclass(default, Section) else None


def _default(section: type[Section] | None, field: str) -> Any:
    """The default of a part of the config that the file leaves out, so that an override can change one value of it.

    For a section: the values that its default sets (`label.resources` has half a CPU); for a list or a dict: the whole
    default.
    """
    if section is None or field not in section.model_fields:
        return {}
    default = section.model_fields[field].default
    if isinstance(default, Section):
        return default.model_dump(exclude_unset=True)
    if isinstance(default, list | tuple):
        return [item.model_dump() if isinstance(item, Section) else item for item in default]
    return dict(default) if isinstance(default, dict) else {}


def _first_problem(error: ValidationError) -> str:
    problems = error.errors()
    first = problems[0]
    where = ".".join(str(part) for part in first["loc"])
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if first["type"] == "extra_forbidden":
        return f"unknown field '{where}'; check the spelling{more}"
    silent = first["type"] == "missing" or isinstance(first["input"], dict | Section)
    silent = silent or any(part in PRIVATE for part in first["loc"])
    silent = silent or has_secret({str(part): first["input"] for part in first["loc"]})
    got = "" if silent else f", got {one_line(repr(first['input']), 200)}"
    message = first["msg"].removeprefix("Value error, ")
    field = f"field '{where}': " if where else ""  # a rule of several fields names them itself
    return one_line(f"{field}{message}{got}", 300) + more


def _yaml_problem(error: Exception) -> str:
    """The error and its place; without PyYAML's text, which quotes the line and so could show a key."""
    if not isinstance(error, yaml.YAMLError):
        return one_line(error, 200)
    mark = getattr(error, "problem_mark", None)
    where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    return one_line(getattr(error, "problem", None) or type(error).__name__, 160) + where
