import gc
import os
import signal
from collections.abc import Iterator

# Before torch is imported, which reads it once. Several test processes share the cores, and two threads that wait for
# each other's time slices are many times slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import settings

from tests import local_ray

# As in a terminal, also where a script has started the tests in the background: commands are ended by SIGINT here.
signal.signal(signal.SIGINT, signal.default_int_handler)
gc.disable()  # until the tests are collected: what they import stays, and looking through it is a fifth of the time
pytest_plugins = ["tests.chaos"]
# A busy machine is no failure, and the same examples are drawn each time: a change is judged by what it changes.
# HYPOTHESIS_PROFILE=explore draws new and more ones.
settings.register_profile("same", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

FIRST = (
    *(f"tests/{name}.py" for name in ("e2e/test_pipeline", "cluster/test_sft", "cluster/test_scoring")),
    *(f"tests/e2e/test_{name}.py" for name in ("grpo_policy", "job", "evaluate", "grpo_recovery", "interruption")),
    *(f"tests/cluster/test_{name}.py" for name in ("labeling", "learners", "bad_input")),
    *("tests/e2e", "tests/cluster"),
    *(f"tests/unit/test_{name}.py" for name in ("sandbox_attacks", "fuzz_files", "fuzz_config", "rewards", "chat")),
)
"""The longest files first, so that the processes which share the tests end together; while one makes the run that most
of tests/e2e start from, another tests without it. Files that share a process's Ray follow each other."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        return next((at for at, start in enumerate(FIRST) if item.nodeid.startswith(start)), len(FIRST))

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
    """A Ray on this machine, the same for all tests of this process that ask for one."""
    local_ray.start()
    yield


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """That Ray ends before a file that does not ask for it: no other test meets it."""
    if nextitem is None or (item.path != nextitem.path and "cluster" not in getattr(nextitem, "fixturenames", ())):
        local_ray.stop()
