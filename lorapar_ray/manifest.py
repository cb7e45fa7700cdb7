"""A run's `manifest.json`: per stage its status, what decided its result, its files and seconds; and a redo that has
not ended yet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lorapar_ray.errors import UserError

REDO = "redo"
"""In a manifest: a redo that was begun (see `lorapar_ray.pending_redo`); in a stage's entry: that redo's id."""
FORMAT = 2
"""Format of the manifest; format 1, without a number, recorded one digest of a stage's inputs (see
`lorapar_ray.legacy`)."""


def read_manifest(file: Path) -> dict[str, Any]:
    """The manifest in `file`; empty if there is no such file.

    Raises:
        UserError: it is damaged, of a newer version, or cannot be read.
    """
    try:
        if not file.is_file():
            return {}
    except OSError as error:
        raise UserError(f"run directory '{file.parent}' cannot be read: {error.strerror}") from error
    try:
        loaded = json.loads(file.read_text(encoding="utf-8"))
        version = loaded.get("format", 1)
        whole = version in (1, FORMAT) and isinstance(loaded["identity"], dict)
        whole = whole and all(is_entry(entry, version) for entry in loaded["stages"].values())
        whole = whole and _is_redo(loaded.get(REDO))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        whole, version = False, 0
    if isinstance(version, int) and version > FORMAT:
        raise UserError(f"'{file}' has format {version} of a newer lorapar_ray; update lorapar_ray")
    if not whole:
        raise UserError(
            f"'{file}' is damaged, so the run's finished stages are unknown; restore the file or "
            "choose another --run-dir"
        )
    found: dict[str, Any] = loaded
    return found


def is_entry(entry: Any, version: int = FORMAT) -> bool:
    """Whether a value is a valid entry of a stage in a manifest of this version, in all used parts.

    Raises:
        KeyError, TypeError, AttributeError: it is not.
    """
    inputs, seconds = entry.get("inputs"), entry.get("seconds", 0)
    parts = [inputs[name] for name in ("settings", "sources", "files")] if version == FORMAT and inputs else []
    return (
        entry["status"] in ("started", "done")
        and all(isinstance(each, dict) for each in (*parts, entry.get("versions", {}), entry.get("outputs_for", {})))
        and isinstance(seconds, int | float)
        and 0 <= seconds < float("inf")
        and all(isinstance(size, int) and isinstance(known, str) for size, known in entry.get("written", {}).values())
    )


def _is_redo(value: Any) -> bool:
    """Whether a value of a manifest is a redo that was begun, or none."""
    if value is None:
        return True
    lists = (value["stages"], value["allowed"])
    words = (value["id"], value["settings"], *lists[0], *lists[1])
    return all(isinstance(each, list) for each in lists) and all(isinstance(each, str) for each in words)
