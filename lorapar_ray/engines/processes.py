"""An engine's processes, forked from one that has imported vLLM already.

vLLM runs an engine's core in a process of its own, which it spawns from a Ray actor: the core imports vLLM once more,
6 to 40 seconds on a slow machine, after the actor has. Here a fork server (Python's own) imports it while the actor
does, and the core is forked from there; so is the process in which vLLM looks at an unknown model's class.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lorapar_ray.engines.phases import Phases

PRELOAD = "lorapar_ray.engines.preload"


def start_async_llm(arguments: Mapping[str, Any], phases: Phases) -> Any:
    """A running `vllm.AsyncLLM`; `arguments` go before those of `platform_arguments`."""
    with phases.phase("importing vLLM"):
        begin_to_import()
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        from lorapar_ray.engines.settings import platform_arguments

        wanted = AsyncEngineArgs(**{**platform_arguments(), **arguments})
    with phases.phase("loading the model and making room for its cache"):
        try:
            with forked_processes():
                return AsyncLLM.from_engine_args(wanted)
        except (ConnectionError, EOFError) as error:  # the fork server is gone
            print(f"lorapar: vLLM spawns its processes: no fork server ({type(error).__name__}: {error})", flush=True)
            return AsyncLLM.from_engine_args(wanted)


def begin_to_import() -> None:
    """Start this process's fork server; it imports vLLM meanwhile. Call it before importing vLLM here."""
    from multiprocessing.forkserver import ensure_running

    if library := _openmp():
        os.environ["LD_PRELOAD"] = ":".join(filter(None, [os.environ.get("LD_PRELOAD"), library]))
    multiprocessing.set_forkserver_preload([PRELOAD])
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # Ray adds to this process's what it needs
    try:
        with _no_main_module():
            ensure_running()
    finally:
        os.environ.pop("PYTHONPATH") if path is None else os.environ.update(PYTHONPATH=path)


@contextmanager
def forked_processes() -> Iterator[None]:
    """vLLM starts its processes from the fork server while the block runs."""
    import vllm.model_executor.models.registry as registry
    import vllm.v1.engine.utils as utils

    spawned, in_a_subprocess = utils.get_mp_context, registry._run_in_subprocess
    utils.get_mp_context = ForkContext
    registry._run_in_subprocess = _in_a_fork
    try:
        with _no_main_module():
            yield
    finally:
        utils.get_mp_context, registry._run_in_subprocess = spawned, in_a_subprocess


class ForkContext:
    """As much of a multiprocessing context as vLLM uses for an engine's core."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")

    def Process(self, target: Callable[..., None], name: str, kwargs: Mapping[str, Any]) -> Any:
        """A process with this one's environment as it is now; the fork server's is older."""
        return self._context.Process(
            target=with_environment, name=name, args=(dict(os.environ), target), kwargs=dict(kwargs)
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


def with_environment(environment: Mapping[str, str], function: Callable[..., None], **arguments: Any) -> None:
    """Call `function` with `environment` in place of the process's own, until whoever started this process ends."""
    os.environ.clear()
    os.environ.update(environment)
    threading.Thread(target=_end_with_the_parent, daemon=True, name="parent-watch").start()
    function(**arguments)


def _end_with_the_parent() -> None:
    """Ray ends a killed actor's children, but not those of its fork server, which would keep a GPU for themselves."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _in_a_fork(function: Callable[[], Any]) -> Any:
    """What `function` returns, computed in a process that ends with it."""
    import cloudpickle

    context = multiprocessing.get_context("forkserver")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(cloudpickle.dumps(function), there))
    process.start()
    there.close()
    try:
        error, answer = here.recv()
    except EOFError:
        error, answer = RuntimeError("the process that looked at the model's class died"), None
    process.join()
    if error is not None:
        raise error
    return answer


def _answer(function: bytes, pipe: Any) -> None:
    import cloudpickle

    try:
        pipe.send((None, cloudpickle.loads(function)()))
    except Exception as error:
        pipe.send((RuntimeError(f"{type(error).__name__}: {error}"), None))


@contextmanager
def _no_main_module() -> Iterator[None]:
    """Children would run this process's main module again, Ray's worker script; none of them needs anything of it."""
    main = sys.modules["__main__"]
    file = getattr(main, "__file__", None)
    if file is not None:
        del main.__file__
    try:
        yield
    finally:
        if file is not None:
            main.__file__ = file


def _openmp() -> str | None:
    """Torch's own OpenMP library, which vLLM's CPU kernels must share: vLLM sets it for processes that it spawns."""
    torch = find_spec("torch")
    if "gomp" in os.environ.get("LD_PRELOAD", "") or torch is None or torch.origin is None or not _vllm_is_for_cpus():
        return None
    folder = Path(torch.origin).parent
    found = [*(folder.parent / "torch.libs").glob("libgomp*"), *(folder / "lib").glob("libgomp*")]
    return str(found[0]) if found else None


def _vllm_is_for_cpus() -> bool:
    """By its distribution: asking vLLM itself would import it."""
    try:
        return "cpu" in version("vllm")
    except PackageNotFoundError:
        return True
