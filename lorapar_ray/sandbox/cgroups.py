"""A cgroup for each sandbox, if this process may create one: it limits memory and tasks of a whole job."""

from __future__ import annotations

import os
import uuid
from contextlib import suppress
from pathlib import Path

from lorapar_ray.sandbox.limits import Limits

ROOT = Path("/sys/fs/cgroup")
PREFIX = "lorapar-sandbox"


class Cgroup:
    """Groups below this process's cgroup; in version 1 one for each writable controller.

    The folder of killed processes can be removed. A sandbox that was itself killed leaves its folders to the next
    sandbox, which removes them.
    """

    def __init__(self, limits: Limits) -> None:
        """`folders` is empty if nothing is writable."""
        name = f"{PREFIX}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        memory, tasks = str(limits.memory_mb * 2**20), str(limits.tasks)
        self.folders: list[Path] = []
        for parent, files in _parents(memory, tasks):
            _remove_orphans(parent)
            folder = parent / name
            try:
                folder.mkdir()
                self.folders.append(folder)
                for file, value in files.items():
                    (folder / file).write_text(value, encoding="utf-8")
            except OSError:
                with suppress(OSError):
                    folder.rmdir()
                self.folders = [each for each in self.folders if each.is_dir()]

    def command(self, command: list[str]) -> list[str]:
        """`command`, joining the group before it starts."""
        if not self.folders:
            return command
        join = "; ".join(f"echo $$ > '{folder}/cgroup.procs'" for folder in self.folders)
        return ["/bin/sh", "-c", f'{join}; exec "$@"', "sh", *command]

    def close(self) -> None:
        """Remove the groups; a group with a process that is still ending is left to the next sandbox."""
        for folder in self.folders:
            with suppress(OSError):
                folder.rmdir()
        self.folders = []


def _parents(memory: str, tasks: str) -> list[tuple[Path, dict[str, str]]]:
    """Folders in which groups can be created, and the values to write there."""
    found = []
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "" and (ROOT / "cgroup.controllers").is_file():
                parent = ROOT / path.lstrip("/")
                enabled = (parent / "cgroup.subtree_control").read_text(encoding="utf-8").split()
                if {"memory", "pids"} <= set(enabled):
                    files = {"memory.max": memory, "memory.swap.max": "0", "pids.max": tasks}
                    found.append((parent, files))
            elif controllers == "memory":
                found.append((ROOT / "memory" / path.lstrip("/"), {"memory.limit_in_bytes": memory}))
            elif controllers == "pids":
                found.append((ROOT / "pids" / path.lstrip("/"), {"pids.max": tasks}))
    return found


def _remove_orphans(parent: Path) -> None:
    with suppress(OSError):
        for folder in parent.glob(f"{PREFIX}-*"):
            if not Path(f"/proc/{folder.name.split('-')[2]}").exists():
                with suppress(OSError):
                    folder.rmdir()
