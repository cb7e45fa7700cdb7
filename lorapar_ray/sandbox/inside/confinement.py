"""Limits that a process sets on itself before it runs foreign code; none can be undone."""

from __future__ import annotations

import os
import resource
import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

PR_SET_PDEATHSIG = 1
PR_SET_SECCOMP = 22
PR_CAPBSET_DROP = 24
PR_SET_NO_NEW_PRIVS = 38
LAST_CAPABILITY = 63
PENDING_SIGNALS = 64
"""Queued signals and timers, which share one limit over all processes of a user."""


def limit(what: int, most: int) -> None:
    """Lower a resource limit, soft and hard; a lower existing limit stays."""
    _, hard = resource.getrlimit(what)
    lowest = most if hard == resource.RLIM_INFINITY else min(hard, most)
    resource.setrlimit(what, (lowest, lowest))


def confine(settings: dict[str, Any]) -> None:
    """Limit this process as the process outside asks.

    Args:
        settings: made by `layers` from `Limits`: memory_bytes (or None), file_bytes, open_files, seconds (or None).
            `tasks`, or None if the user's other processes would count too. `landlock`, {readable, library} of
            `_landlock`, or None. `seccomp`, {processes, metadata} of `seccomp.program`, or None if the filter is
            already active.
    """
    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_FSIZE, settings["file_bytes"])
    limit(resource.RLIMIT_NOFILE, settings["open_files"])
    limit(resource.RLIMIT_MEMLOCK, 0)
    limit(resource.RLIMIT_MSGQUEUE, 0)
    limit(resource.RLIMIT_SIGPENDING, PENDING_SIGNALS)
    if settings["seconds"] is not None:
        limit(resource.RLIMIT_CPU, int(settings["seconds"]) + 2)
    if settings["landlock"] is not None:
        _landlock(**settings["landlock"])
    if settings["seccomp"] is not None:
        _drop_capabilities()
        _filter(**settings["seccomp"])
    if settings["tasks"] is not None:
        limit(resource.RLIMIT_NPROC, settings["tasks"])
    if settings["memory_bytes"] is not None:
        limit(resource.RLIMIT_AS, settings["memory_bytes"])


def forbid_processes() -> None:
    """From now on this process can start no child and no other program."""
    _filter(processes=False, metadata=False)


def _landlock(readable: list[str], library: str) -> None:
    """Only `readable` can be read and nothing can be written; signals and abstract sockets cannot reach other
    processes.

    `library` is sandlock's; it is called without its Python package, whose import takes longer than a program's run.
    """
    import ctypes

    sandlock = ctypes.CDLL(library)
    pointer = ctypes.c_void_p
    for name, parameters in (
        ("sandbox_builder_new", ()),
        ("sandbox_builder_fs_read", (pointer, ctypes.c_char_p)),
        ("sandbox_builder_on_exit", (pointer, ctypes.c_uint8)),
        ("sandbox_builder_on_error", (pointer, ctypes.c_uint8)),
        ("sandbox_build", (pointer, pointer, pointer)),
    ):
        function = getattr(sandlock, f"sandlock_{name}")
        function.restype, function.argtypes = pointer, parameters
    sandlock.sandlock_confine.argtypes = (pointer,)
    policy = sandlock.sandlock_sandbox_builder_new()
    for path in readable:
        policy = sandlock.sandlock_sandbox_builder_fs_read(policy, os.fsencode(path))
    policy = sandlock.sandlock_sandbox_builder_on_exit(policy, 0)  # commit; no other file system changes to undo
    policy = sandlock.sandlock_sandbox_builder_on_error(policy, 1)  # abort
    error, said = ctypes.c_int(0), ctypes.c_char_p()
    built = sandlock.sandlock_sandbox_build(policy, ctypes.byref(error), ctypes.byref(said))
    if not built or error.value or sandlock.sandlock_confine(built):
        raise OSError(f"Landlock cannot be set up: {(said.value or b'').decode(errors='replace')}")


def _drop_capabilities() -> None:
    """Drop all capabilities: root then has only a normal user's rights, also in programs that it starts."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    for capability in range(LAST_CAPABILITY + 1):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    if libc.capset(header, (ctypes.c_uint32 * 6)()) != 0:
        raise OSError(ctypes.get_errno(), "capabilities cannot be dropped")


def _filter(processes: bool, metadata: bool) -> None:
    import ctypes

    from . import seccomp

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))

    code = seccomp.program(processes=processes, metadata=metadata, pid=os.getpid())
    program = Program(len(code) // 8, code)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(PR_SET_SECCOMP, 2, ctypes.byref(program), 0, 0):
        raise OSError(ctypes.get_errno(), "the system call filter cannot be set")
