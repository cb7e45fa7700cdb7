"""An engine's processes, forked from a process that has already imported vLLM.

vLLM spawns an engine's core as a separate process from a Ray actor: the core imports vLLM once more after the actor,
which takes 6 to 40 seconds. Here a fork server (Python's own) imports it in parallel with the actor, and the core is
forked from it; so is the process in which vLLM inspects an unknown model's class.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lorapar_ray.engines.folder import engine_folder, sockets_in
from lorapar_ray.engines.phases import Phases
from lorapar_ray.engines.refusals import leave_cause, refusing
from lorapar_ray.heavy_imports import import_when_used, without_collecting, without_module
from lorapar_ray.replaced import replaced

PRELOAD = "lorapar_ray.engines.preload"
UNUSABLE = "unusable"
"""Name of a file that a forked process creates before it ends if it cannot use the GPU."""
CUDA_NOT_INITIALIZED = 3
"""The CUDA driver's error in a child of a process that had initialised CUDA."""


def start_async_llm(arguments: Mapping[str, Any], phases: Phases, where: str) -> Any:
    """A running `vllm.AsyncLLM`; `arguments` take precedence over `platform_arguments`.

    With vLLM's own `VLLM_WORKER_MULTIPROC_METHOD=spawn` in the environment its processes are spawned.

    Args:
        where: the config's field that holds the engine's settings.

    Raises:
        UserError: vLLM cannot serve the model, or not with these settings.
    """
    forks = os.environ.get("VLLM_WORKER_MULTIPROC_METHOD") != "spawn"
    own = Path(tempfile.mkdtemp(dir=engine_folder()))  # notes on one failed start say nothing about the next
    with refusing(str(arguments["model"]), where, own if forks else None), sockets_in(engine_folder()):
        return _start(arguments, phases, own, forks)


def _start(arguments: Mapping[str, Any], phases: Phases, folder: Path, forks: bool) -> Any:
    """As `start_async_llm`; a forked process writes the reason of its end to `folder`."""
    with phases.phase("importing vLLM"), without_collecting():
        if forks:
            begin_to_import(engine_folder())
        _import_vllm_to_ask()
        from vllm import AsyncEngineArgs
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        from lorapar_ray.engines.settings import platform_arguments, require_head_size

        wanted = AsyncEngineArgs(**{**platform_arguments(), **arguments})
    with phases.phase("loading the model and making room for its cache"):
        try:
            with forked_processes(folder) if forks else nullcontext():
                settings = wanted.create_engine_config(UsageContext.ENGINE_CONTEXT)
                require_head_size(settings.model_config)
                return AsyncLLM.from_vllm_config(settings, disable_log_stats=wanted.disable_log_stats)
        except Exception as error:
            if not (folder / UNUSABLE).exists() and not isinstance(error, ConnectionError | EOFError):
                raise
        print("lorapar: no engine can be forked here; vLLM spawns its processes", flush=True)
        return AsyncLLM.from_engine_args(wanted)


def _import_vllm_to_ask() -> None:
    """Import vLLM in a process that only passes requests on to its engine, without the compiler's table of operators.

    vLLM adds its own operators to that table as soon as it is imported, half a second of a core. Only the engine's
    other process compiles anything.
    """
    if "vllm" in sys.modules:
        return
    import_when_used("scipy.signal")
    with without_module("torch._inductor.lowering"):
        import vllm  # noqa: F401


def begin_to_import(folder: Path) -> None:
    """Start this process's fork server, which imports vLLM in parallel. Call it before importing vLLM here.

    Args:
        folder: for the server's socket.
    """
    from multiprocessing.forkserver import ensure_running

    if library := _openmp():
        os.environ["LD_PRELOAD"] = ":".join(filter(None, [os.environ.get("LD_PRELOAD"), library]))
    multiprocessing.set_forkserver_preload([PRELOAD])
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # Ray adds to this process's what it needs
    try:
        with _no_main_module(), replaced(tempfile, "tempdir", str(folder)):
            ensure_running()
    finally:
        os.environ.pop("PYTHONPATH") if path is None else os.environ.update(PYTHONPATH=path)


@contextmanager
def forked_processes(folder: Path) -> Iterator[None]:
    """vLLM starts its processes from the fork server while the block runs.

    Args:
        folder: for their temporary files, and the reason of a failed start: `UNUSABLE`, or the `CAUSE`.
    """
    import vllm.model_executor.models.registry as registry
    import vllm.v1.engine.utils as utils

    spawned, in_a_subprocess = utils.get_mp_context, registry._run_in_subprocess
    utils.get_mp_context = partial(ForkContext, folder)
    registry._run_in_subprocess = answer_of
    try:
        with _no_main_module():
            yield
    finally:
        utils.get_mp_context, registry._run_in_subprocess = spawned, in_a_subprocess


class ForkContext:
    """The part of a multiprocessing context that vLLM uses for an engine's core."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._context = multiprocessing.get_context("forkserver")

    def Process(self, target: Callable[..., None], name: str, kwargs: Mapping[str, Any]) -> Any:
        """A process with this process's current environment; the fork server's is older."""
        arguments = (str(self._folder), dict(os.environ), target)
        return self._context.Process(target=in_a_fork, name=name, args=arguments, kwargs=dict(kwargs))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


def in_a_fork(folder: str, environment: Mapping[str, str], function: Callable[..., None], **arguments: Any) -> None:
    """Call `function` with `environment` as the process's environment, and its temporary files in `folder`; end when
    the parent process ends."""
    if cuda_is_lost():
        (Path(folder) / UNUSABLE).touch()
        os._exit(1)
    os.environ.clear()
    os.environ.update(environment)
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"  # for its workers: CUDA is initialised here
    tempfile.tempdir = folder
    threading.Thread(target=_end_with_the_parent, daemon=True, name="parent-watch").start()
    try:
        function(**arguments)
    except Exception as error:
        leave_cause(Path(folder), error)
        raise


def cuda_is_lost() -> bool:
    """Whether the parent of this forked process has initialised CUDA, which then always fails here."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False  # no GPU
    return bool(driver.cuInit(0) == CUDA_NOT_INITIALIZED)


def _end_with_the_parent() -> None:
    """Ray ends a killed actor's children, but not its fork server's, which would keep a GPU's memory."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def answer_of(function: Callable[[], Any]) -> Any:
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
        error, answer = RuntimeError("the process that inspected the model's class died"), None
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
    """Keep children from running this process's main module, Ray's worker script, again; they do not need it."""
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
    """Torch's OpenMP library, which vLLM's CPU kernels must share; vLLM sets it only for processes that it spawns."""
    torch = find_spec("torch")
    if "gomp" in os.environ.get("LD_PRELOAD", "") or torch is None or torch.origin is None or not _vllm_is_for_cpus():
        return None
    folder = Path(torch.origin).parent
    found = [*(folder.parent / "torch.libs").glob("libgomp*"), *(folder / "lib").glob("libgomp*")]
    return str(found[0]) if found else None


def _vllm_is_for_cpus() -> bool:
    """Read from the distribution's metadata, which does not import vLLM."""
    try:
        return "cpu" in version("vllm")
    except PackageNotFoundError:
        return True
