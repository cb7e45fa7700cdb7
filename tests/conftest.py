import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

# Set before torch is imported, which reads it once. Several test processes share the cores: two threads that wait for
# each other's time slices are much slower than one. Torch itself is imported where it is needed: not in xdist's first
# process, which only deals the tests out.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from hypothesis import settings

from tests import local_ray

# As in a terminal, even if a script has started the tests in the background: tests end commands by SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)
gc.disable()  # until the tests are collected: imported modules stay, and scanning them takes a fifth of the time
pytest_plugins = ["tests.chaos"]
# A busy machine is not a failure. Every run draws the same examples, so that results depend only on the code.
# HYPOTHESIS_PROFILE=explore draws more and new ones.
settings.register_profile("same", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

FIRST = (
    *(f"tests/{name}.py" for name in ("e2e/test_pipeline", "cluster/test_sft", "cluster/test_scoring")),
    *(f"tests/e2e/test_{name}.py" for name in ("job", "grpo_policy", "grpo_recovery", "evaluate", "faults")),
    *(f"tests/cluster/test_{name}.py" for name in ("labeling", "learners", "bad_input")),
    *("tests/e2e", "tests/cluster"),
    *(f"tests/unit/test_{name}.py" for name in ("sandbox_attacks", "fuzz_files", "fuzz_config", "rewards", "chat")),
)
"""The longest files first, so that the processes which share the tests end together; while one makes the run that most
of tests/e2e start from, another tests without it. Files that share a process's Ray follow each other."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        return next((at for at, start in enumerate(FIRST) if item.nodeid.startswith(start)), len(FIRST))

    import torch

    items.sort(key=place)
    without = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(without)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray on this machine, shared by all tests of this process that use it."""
    local_ray.start()
    yield


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny student, for all tests of this process that only read it."""
    from tests.tiny_run import save_tiny_student

    return save_tiny_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(autouse=True)
def _precision_stays() -> Iterator[None]:
    """Later tests of this process would compute with another precision."""
    import torch

    yield
    left = torch.get_default_dtype(), torch.is_autocast_enabled("cpu"), torch.get_float32_matmul_precision()
    torch.set_default_dtype(torch.float32)
    torch.set_autocast_enabled("cpu", False)
    torch.set_float32_matmul_precision("highest")
    assert left == (torch.float32, False, "highest")


@pytest.fixture(scope="session", autouse=True)
def models_on_the_cpu() -> Iterator[pytest.MonkeyPatch]:
    """Also where there is a GPU: the code's model would be there, and the test's own model and tokens here. Workers of
    Ray are processes of their own, which this does not change."""
    with pytest.MonkeyPatch.context() as patch:
        _models_on_the_cpu(patch)
        yield patch


def _models_on_the_cpu(patch: pytest.MonkeyPatch) -> None:
    import torch

    if torch.cuda.is_available():
        for module in ("student", "sharding"):
            patch.setattr(f"lorapar_ray.{module}.device", lambda: torch.device("cpu"))


@pytest.fixture(autouse=True)
def _models_of_gpu_tests(request: pytest.FixtureRequest, models_on_the_cpu: pytest.MonkeyPatch) -> Iterator[None]:
    """Are where Ray would put them."""
    if not request.node.get_closest_marker("gpu"):
        yield
        return
    models_on_the_cpu.undo()
    yield
    _models_on_the_cpu(models_on_the_cpu)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """End that Ray before a file that does not use it, so that other tests run without it."""
    if nextitem is None or (item.path != nextitem.path and not _uses_ray(item.session, nextitem.path)):
        local_ray.stop()


def _uses_ray(session: pytest.Session, file: Path) -> bool:
    return any("cluster" in getattr(item, "fixturenames", ()) for item in session.items if item.path == file)
