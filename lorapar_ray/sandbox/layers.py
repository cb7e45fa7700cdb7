"""The ways to confine a process, strongest first, and the command of each."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from lorapar_ray.errors import UserError
from lorapar_ray.sandbox.inside import seccomp
from lorapar_ray.sandbox.limits import Limits

LayerName = Literal["auto", "bubblewrap", "sandlock", "process"]
HERE = Path(__file__).parent
FILE_BYTES = 16 * 2**20
OPEN_FILES = 64
REAP_S = 2.0
"""Time for bubblewrap to notice that its child has ended."""


@dataclass(frozen=True)
class Start:
    """A process to be confined: `inside.<module>.main`, or the user's Python module."""

    module: str
    limits: Limits
    timed: bool = True
    """Whether CPU time is limited too."""
    forks: bool = False
    """Whether it may start processes itself."""
    readable: tuple[str, ...] = ()
    """Further folders that it can read."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings for `main`, in addition to the limits or instead of them."""


class Bubblewrap:
    """Own user, PID, mount, network, IPC, UTS and cgroup namespaces; an empty root; Python, read-only; no /proc."""

    name: LayerName = "bubblewrap"

    def __init__(self, binary: str) -> None:
        self._binary = binary

    def command(self, start: Start, fd: int, told: int) -> list[str]:
        """The command; it reads the system call filter from `fd`, and writes the child's process id to `told`."""
        options = [
            *("--unshare-user", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"),
            *("--unshare-cgroup-try", "--disable-userns", "--cap-drop", "ALL"),
            *("--new-session", "--die-with-parent", "--clearenv", "--hostname", "sandbox"),
            *("--seccomp", str(fd), "--info-fd", str(told)),
            # a single process has no children, so no other process needs to wait for them
            *(() if start.forks or start.limits.processes else ("--as-pid-1",)),
            *("--size", str(start.limits.scratch_mb * 2**20), "--tmpfs", "/tmp", "--chdir", "/tmp"),
        ]
        for path in system_folders():
            if path.is_symlink():
                options += ["--symlink", str(path.readlink()), str(path)]
            else:
                options += ["--ro-bind", str(path), str(path)]
        for path in dict.fromkeys((*python_files(), HERE / "inside", *map(Path, start.readable))):
            options += ["--ro-bind", str(path), str(path)]
        for device in ("null", "zero", "urandom", "random"):
            options += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
        options += ["--remount-ro", "/"]
        settings = _settings(start) | {"tasks": start.limits.tasks + 2, "landlock": None, "seccomp": None}
        return [self._binary, *options, "--", *python_command(start.module, settings)]

    def filter(self, start: Start) -> bytes | None:
        """The system call filter that the command reads."""
        # bubblewrap sets the filter before it executes Python, so execution must be allowed; its root has no other
        # programs
        return seccomp.program(processes=start.forks or start.limits.processes, execute=True, metadata=True)


class Sandlock:
    """Landlock (reads only Python, writes nothing, signals no other process) and a system call filter; one process, no
    network."""

    name: LayerName = "sandlock"

    def command(self, start: Start, fd: int, told: int) -> list[str]:
        """The command."""
        folders = [str(path.resolve()) for path in (*system_folders(), *python_files(), HERE / "inside")]
        folders += [str(Path(path).resolve()) for path in start.readable]
        devices = ["/dev/null", "/dev/zero", "/dev/urandom", "/dev/random"]
        settings = _settings(start) | {
            "tasks": None,
            "landlock": {"readable": sorted({*folders, *devices}), "library": _sandlock_library()},
            "seccomp": {"processes": start.forks, "metadata": False},
        }
        return python_command(start.module, settings)

    def filter(self, start: Start) -> bytes | None:
        """None: the process sets the filter itself, with its own process id in it."""
        return None


class Process:
    """Resource limits and a system call filter only: every file that this user can read is open to the program."""

    name: LayerName = "process"

    def command(self, start: Start, fd: int, told: int) -> list[str]:
        """The command."""
        seccomp_settings = {"processes": start.forks, "metadata": False}
        settings = _settings(start) | {"tasks": None, "landlock": None, "seccomp": seccomp_settings}
        return python_command(start.module, settings)

    def filter(self, start: Start) -> bytes | None:
        """None: see `Sandlock`."""
        return None


Layer = Bubblewrap | Sandlock | Process


class Confined(subprocess.Popen[bytes]):
    """A confined process, or the bubblewrap process that waits for it."""

    def __init__(self, command: list[str], told: int, **options: Any) -> None:
        """`told`: the read end of a pipe to which bubblewrap writes its child's process id; closed with the process."""
        self._told = told
        super().__init__(command, **options)

    def kill(self) -> None:
        """End the confined process first; bubblewrap then ends by itself.

        If bubblewrap were killed, it would leave a zombie to process 1, which counts in the cgroup until process 1
        reaps it; in many containers it never does.
        """
        if self.returncode is None and (inner := self._inner()) is not None:
            with suppress(ProcessLookupError):
                os.kill(inner, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                self.wait(REAP_S)
        super().kill()

    def _inner(self) -> int | None:
        """The child, while bubblewrap has not reaped it: until then no other process gets its id."""
        try:
            if select.select([self._told], [], [], 0)[0]:
                child = int(json.loads(os.read(self._told, 4096) or b"{}").get("child-pid", 0))
                parent = Path(f"/proc/{child}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1]
                return child if int(parent) == self.pid else None
        except (OSError, ValueError):
            pass  # it has ended
        return None

    def __del__(self) -> None:
        with suppress(OSError):
            os.close(self._told)
        super().__del__()


def spawn(
    layer: Layer,
    start: Start,
    *,
    stdin: int,
    stdout: int,
    stderr: int | None,
    wrap: Callable[[list[str]], list[str]] = list,
) -> Confined:
    """Start a confined process with an empty environment; it dies with the calling thread.

    Args:
        stdin, stdout, stderr: as for `subprocess.Popen`.
        wrap: wraps the whole command (see `Cgroup.command`).

    Raises:
        UserError: the limits allow processes, but the layer does not.
    """
    if start.limits.processes and not isinstance(layer, Bubblewrap):
        raise UserError(f"sandbox: only bubblewrap can end what a program starts; '{layer.name}' allows no processes")
    program = layer.filter(start)
    told, tell = os.pipe()
    with tempfile.TemporaryFile() as file, os.fdopen(tell, "wb"):
        if program is not None:
            file.write(program)
            file.flush()
            file.seek(0)
        return Confined(
            wrap(layer.command(start, file.fileno(), tell)),
            told,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            pass_fds=() if program is None else (file.fileno(), tell),
            env={},
            cwd="/",
            start_new_session=True,
        )


def python_command(module: str, settings: dict[str, Any]) -> list[str]:
    """Run `inside.<module>.main(settings)` in an isolated Python without site packages."""
    code = f"import sys; sys.path.append({str(HERE)!r}); from inside.{module} import main; main(*{[settings]!r})"
    return [str(_python()), "-I", "-S", "-c", code]


def _settings(start: Start) -> dict[str, Any]:
    limits = start.limits
    return {
        "memory_bytes": limits.memory_mb * 2**20,
        "file_bytes": min(FILE_BYTES, limits.scratch_mb * 2**20),
        "seconds": limits.seconds if start.timed else None,
        "open_files": OPEN_FILES,
        **start.settings,
    }


@lru_cache
def system_folders() -> tuple[Path, ...]:
    """Folders of shared libraries."""
    return tuple(path for path in map(Path, ("/usr/lib", "/usr/lib64", "/lib", "/lib64")) if path.exists())


def _python() -> Path:
    base: str = getattr(sys, "_base_executable", sys.executable)
    return Path(base).resolve()


@lru_cache
def python_files() -> tuple[Path, ...]:
    """The interpreter, its shared library and its standard library, unless they are in the system's folders."""
    library = Path(sys.base_prefix) / "lib"
    wanted = [_python(), Path(sysconfig.get_path("stdlib")), *library.glob("libpython*.so*")]
    wanted.append(Path(sysconfig.get_config_var("DESTSHARED") or wanted[1] / "lib-dynload"))
    kept: list[Path] = []
    for path in wanted:
        covered = any(path.is_relative_to(folder) for folder in (*system_folders(), *kept))
        if path.exists() and not covered:
            kept.append(path)
    return tuple(kept)


@lru_cache
def _sandlock_library() -> str:
    found = find_spec("sandlock")
    libraries = (
        [] if found is None or found.origin is None else [*Path(found.origin).parent.glob("libsandlock_ffi*.so")]
    )
    if not libraries:
        raise UserError("sandbox: the package sandlock or its library is not installed; pip install sandlock")
    return str(libraries[0])
