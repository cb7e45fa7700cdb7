"""The state of a stage: whether its results match the present config and files, and if not, why."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lorapar_ray.config import Config
from lorapar_ray.config.marks import known_setting
from lorapar_ray.files import digest
from lorapar_ray.fingerprints import Fingerprints
from lorapar_ray.redact import HIDDEN as REDACTED
from lorapar_ray.redact import has_secret
from lorapar_ray.runs import RunDirectory
from lorapar_ray.stages import OUTPUTS_FOR, Settings, Stage
from lorapar_ray.trash import in_trash

State = Literal["done", "unfinished", "new", "changed", "damaged"]
HIDDEN = ("base_url", "extra_body")
"""Settings that may hold a key: for these, and for any other that does, only a digest is recorded."""
DIGEST = "digest "
LONGEST = 48
"""Most characters of a shown value."""


@dataclass(frozen=True)
class Standing:
    """`done`; `unfinished`: has partial results to resume from; `new`: has no results; `changed`: has results
    of other settings or inputs, in place or in trash/; `damaged`: its results are not as it left them."""

    state: State
    why: tuple[str, ...] = ()


def inputs_of(stage: Stage, config: Config, entries: Mapping[str, Any], prints: Fingerprints) -> dict[str, Any]:
    """Everything that changes a stage's result, JSON-ready, as recorded in the manifest.

    `settings` by path; `sources`, results of each earlier stage; `files`, contents of the user's own files.
    """
    files = {name: prints.of_input(name) for name in dict.fromkeys(stage.reads(config))}
    return {**_inputs_without_files(stage, config, entries), "files": files}


def recorded_inputs(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs in a manifest's entry; empty if an earlier version recorded one digest of them, or none are known."""
    found = entry.get("inputs")
    return found if isinstance(found, dict) else {}


def _inputs_without_files(stage: Stage, config: Config, entries: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "settings": recorded_settings(stage, config),
        "sources": {need: _source(entries.get(need, {}), stage) for need in stage.needs(config)},
        "files": {},
    }


def _source(entry: Mapping[str, Any], stage: Stage) -> str | None:
    """A digest of what a stage reads of an earlier one's results."""
    found: str | None = entry.get(OUTPUTS_FOR, {}).get(stage.name, entry.get("outputs"))
    return found


def _as_recorded(now: dict[str, Any], recorded: Mapping[str, Any], entries: Mapping[str, Any]) -> dict[str, Any]:
    """Present inputs, with a source as an earlier version recorded it: by all of its results, if these are the same."""
    same = {
        need: known
        for need, known in recorded.get("sources", {}).items()
        if need in now["sources"] and known is not None and known == entries.get(need, {}).get("outputs")
    }
    return {**now, "sources": now["sources"] | same}


def standing_of(
    stage: Stage, config: Config, run: RunDirectory, entries: Mapping[str, Any], prints: Fingerprints
) -> Standing:
    """The state of a stage under `config`.

    Args:
        entries: of the manifest, by stage.
    """
    entry = entries.get(stage.name)
    if entry is None:
        return Standing("new")
    why = differences(stage, config, entry, entries, prints)
    if why:
        has_results = stage.owned(run, config.name) or in_trash(run, stage.name)  # of a redo that was killed early
        return Standing("changed", why) if has_results else Standing("new")
    if entry["status"] != "done":
        return Standing("unfinished")
    damage = tuple(damage_of(run, entry, prints))
    return Standing("damaged", damage) if damage else Standing("done")


def differences(
    stage: Stage, config: Config, entry: Mapping[str, Any], entries: Mapping[str, Any], prints: Fingerprints
) -> tuple[str, ...]:
    """What differs between the inputs of a stage's `entry`, in place or in trash/, and the present ones."""
    recorded = recorded_inputs(entry)
    now = _as_recorded(inputs_of(stage, config, entries, prints), recorded, entries)
    for name, known in recorded.get("files", {}).items():
        if known != now["files"].get(name, known) and known == prints.of_input(name, earlier=True):
            now["files"][name] = known  # an earlier version recorded it, and of what it counted nothing has changed
    return tuple(changes(stage, config, recorded, now))


def recorded_standing(stage: Stage, config: Config, entries: Mapping[str, Any]) -> Standing:
    """The state of a stage as far as the manifest alone tells it: no file is read."""
    entry = entries.get(stage.name)
    if entry is None:
        return Standing("new")
    recorded = recorded_inputs(entry)
    now = _as_recorded(_inputs_without_files(stage, config, entries), recorded, entries)
    why = tuple(changes(stage, config, recorded, now))
    if why:
        return Standing("changed", why)
    return Standing("done" if entry["status"] == "done" else "unfinished")


def changes(stage: Stage, config: Config, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """What differs between recorded and present inputs, a short line each."""
    if "settings" not in old:
        yield "settings or data files that an earlier version recorded as one digest"
        return
    unused = tuple(stage.unused(config))
    yield from _changed_settings(stage.settings(config), unused, old["settings"], new["settings"])
    for need, found in new["sources"].items():
        if found is not None and need in old["sources"] and found != old["sources"][need]:
            yield f"{need} has other results"
    for name, found in new["files"].items():
        if found is not None and old["files"].get(name) not in (None, found):
            yield f"'{name}' has changed"


def _changed_settings(
    settings: Settings, unused: tuple[str, ...], old: Mapping[str, Any], new: Mapping[str, Any]
) -> Iterator[str]:
    for path in dict.fromkeys((*old, *new)):
        if any(path == each or path.startswith(f"{each}.") for each in unused):
            continue
        if path not in new:
            if known_setting(Config, path):
                yield f"{path} {_shown(old[path])} → not set"
        elif path not in old:
            if not settings[path].is_default:  # else a field that is younger than the run
                yield f"{path} not set → {_shown(new[path])}"
        elif old[path] != new[path]:
            if _is_hidden(old[path]) and REDACTED in json.dumps(settings[path].value):
                continue  # the config is the run's own config.yaml, which holds no secrets
            if _is_hidden(new[path]) or _is_hidden(old[path]):
                if _hidden(old[path]) != _hidden(new[path]):
                    yield f"{path} has another value"
            elif isinstance(old[path], dict) and isinstance(new[path], dict):
                keys = [
                    key for key in dict.fromkeys((*old[path], *new[path])) if old[path].get(key) != new[path].get(key)
                ]
                for key in keys:
                    yield f"{path}.{key} {_shown(old[path].get(key))} → {_shown(new[path].get(key))}"
            else:
                yield f"{path} {_shown(old[path])} → {_shown(new[path])}"


def recorded_settings(stage: Stage, config: Config) -> dict[str, Any]:
    """The settings that change a stage's result, by path, JSON-ready; of those that may hold a key, a digest."""
    plain = {path: setting.value for path, setting in stage.settings(config).items()}
    for path, value in plain.items():
        name = path.rpartition(".")[2]
        if value and (name in HIDDEN or has_secret({name: value})):
            plain[path] = _hidden(value)
    loaded: dict[str, Any] = json.loads(json.dumps(plain))
    return loaded


def _hidden(value: Any) -> str:
    return value if _is_hidden(value) else f"{DIGEST}{digest(value)[:16]}"


def _is_hidden(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(DIGEST)


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, float):
        return re.sub(r"e([+-])0*", lambda sign: "e" + sign.group(1).replace("+", ""), f"{value:g}")
    text = value if isinstance(value, str) and value.strip() == value != "" else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def written(stage: Stage, run: RunDirectory, prints: Fingerprints) -> dict[str, list[Any]]:
    """The files of a finished stage: by path, its bytes and their sha256."""
    files = stage.output_files(run)
    return {str(file.relative_to(run.root)): [file.stat().st_size, prints.of_file(file)] for file in files}


def damage_of(run: RunDirectory, entry: Mapping[str, Any], prints: Fingerprints) -> Iterator[str]:
    """How a finished stage's files differ from what its `entry` recorded, a short line each."""
    files: Mapping[str, list[Any]] = entry.get("written", {})
    for name, (size, known) in files.items():
        file: Path = run.root / name
        try:
            if not file.is_file():
                yield f"{name} is missing"
            elif file.stat().st_size != size:
                yield f"{name} has {file.stat().st_size} of {size} bytes"
            elif prints.of_file(file) != known:
                yield f"{name} has changed since it was written"
        except OSError as error:
            yield f"{name} cannot be read ({error.strerror})"
