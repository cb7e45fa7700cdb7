"""Imports libraries with a hundred thousand objects, such as vLLM, faster, and less of them."""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from lorapar_ray.replaced import replaced


@contextmanager
def without_collecting() -> Iterator[None]:
    """Turn garbage collection off while the block imports: imported objects stay, and scanning them takes a fifth of
    the time.

    They are not scanned later either, here or in a forked process (`gc.freeze`).
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


def import_peft() -> None:
    """Import peft, and with it torch and transformers, without torch's compiler.

    peft imports bitsandbytes, which compiles some functions where it defines them: `torch.compile` then imports the
    compiler, a fifth of the whole time. Here they are compiled when they are first called.
    """
    if "peft" in sys.modules:
        return
    with without_collecting():
        import torch

        with replaced(torch, "compile", partial(_compiled_when_called, torch.compile)):
            import peft  # noqa: F401


def import_when_used(name: str) -> None:
    """Let `import name` from now on only note the module, which is imported when the first of its names is used.

    Does nothing for a module that has been imported already, or is not installed. In vLLM it is worth half a second of
    a core for `scipy.signal`, which resamples sound.
    """
    if name in sys.modules:
        return
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:  # not even its package
        return
    if spec is not None:
        sys.modules[name] = _Noted(name)
        sys.modules[name].__spec__ = spec


class _Noted(ModuleType):
    """Stands for a module until a name of it is used."""

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__") and attribute != "__path__":  # of who looks at every module there is
            raise AttributeError(attribute)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), attribute)


@contextmanager
def without_module(name: str) -> Iterator[None]:
    """Let `import name` fail while the block runs, unless it has been imported already."""

    class Refusal(MetaPathFinder):
        def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
            if fullname == name:
                raise ImportError(f"{name} is left out here", name=name)

    refusal = Refusal()
    sys.meta_path.insert(0, refusal)
    try:
        yield
    finally:
        sys.meta_path.remove(refusal)


def _compiled_when_called(compiler: Callable[..., Any], function: Callable[..., Any] | None = None, **how: Any) -> Any:
    """In place of the decorator `torch.compile`, which is `compiler`."""
    if function is None:
        return partial(_compiled_when_called, compiler, **how)
    compiled: list[Callable[..., Any]] = []

    @wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        if not compiled:
            compiled.append(compiler(function, **how))
        return compiled[0](*arguments, **named)

    return call


def is_ray_worker() -> bool:
    """Whether this process runs Ray's tasks or an actor; a driver does not."""
    ray: Any = sys.modules.get("ray")
    return ray is not None and ray._private.worker.global_worker.mode == ray.WORKER_MODE


def leave_out_torch() -> None:
    """Let transformers not import torch in this process, which needs nothing of it but a tokenizer.

    That saves three seconds of a core. It holds for the whole process: transformers can load no model in it. Does
    nothing where transformers has been imported already.
    """
    if "transformers" in sys.modules:
        return
    find = importlib.util.find_spec

    def find_other(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name == "torch" else find(name, package)

    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # of a missing torch
    with replaced(importlib.util, "find_spec", find_other):
        from transformers.utils import is_torch_available

        is_torch_available()  # which remembers its answer
