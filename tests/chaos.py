"""A pytest plugin for tests that kill processes, at moments and places drawn from a seed.

A test with the mark `chaos(stage, *faults)` draws from the fixture `chance`. A test with the mark `fault(stage,
*faults)` also injects a fault, and always runs. By default one drawn chaos test, of one stage only, runs of each stage
of which no fault test kills a process; `--chaos all` runs every one, `--chaos-rounds N` runs each N times with
different draws. The seed is printed; LORAPAR_CHAOS_SEED sets it. The times that the fixture `recovery` measures are
printed at the end.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from random import Random, SystemRandom
from typing import Any

import pytest

SEED = "LORAPAR_CHAOS_SEED"
RECOVERED = "recovered"
KILLS = {"worker", "coordinator", "Serve replica", "engine child", "reward process", "driver"}
Recovery = Callable[[str, str], AbstractContextManager[None]]
"""See the fixture `recovery`."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--chaos", choices=("sample", "all"), default="sample", help="kill tests: one of each stage (see above), or all"
    )
    parser.addoption("--chaos-rounds", type=int, default=1, help="how often each kill test runs")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "chaos(stage, *faults): breaks a stage at drawn moments; see tests/chaos_table.py"
    )
    config.addinivalue_line("markers", "fault(stage, *faults): breaks a stage, every time")
    if not os.environ.get(SEED):
        os.environ[SEED] = str(SystemRandom().randrange(10**6))  # before xdist's processes start, which inherit it


def pytest_report_header() -> str:
    return f"kill tests: seed {os.environ[SEED]}; {SEED} sets it"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "chaos_round" in metafunc.fixturenames:
        metafunc.parametrize("chaos_round", range(metafunc.config.getoption("--chaos-rounds")))


@pytest.fixture
def chance(chaos_round: int, request: pytest.FixtureRequest) -> Random:
    """The random generator of this test, round and seed."""
    return Random(f"{os.environ[SEED]} {request.node.nodeid}")


@pytest.fixture
def thorough(request: pytest.FixtureRequest) -> bool:
    """Whether a test that kills many kinds of process kills all of them."""
    return bool(request.config.getoption("--chaos") == "all")


@pytest.fixture
def recovery(record_property: Callable[[str, object], None]) -> Recovery:
    """Times a block: called with a stage and a fault; the block ends when the work has continued."""

    @contextmanager
    def timed(stage: str, fault: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        record_property(RECOVERED, (stage, fault, time.monotonic() - start))

    return timed


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The table of recovery times."""
    passed = terminalreporter.getreports("passed")
    rows = [value for report in passed for name, value in report.user_properties if name == RECOVERED]
    if rows:
        terminalreporter.section("recovery")
        for stage, fault, seconds in rows:
            terminalreporter.write_line(f"{stage:<10} {fault:<24} {seconds:6.1f} s")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--chaos") == "all":
        return
    marks = [item.get_closest_marker("fault") for item in items]
    killed = {mark.args[0] for mark in marks if mark is not None and not KILLS.isdisjoint(mark.args[1:])}
    by_stage: dict[str, list[str]] = {}
    for item in items:
        stages = [mark.args[0] for mark in item.iter_markers("chaos")]
        if len(stages) == 1:
            by_stage.setdefault(stages[0], []).append(item.nodeid)
    draw = Random(os.environ[SEED])
    kept = {draw.choice(sorted(by_stage[stage])) for stage in sorted(by_stage.keys() - killed)}
    left = [item for item in items if item.get_closest_marker("chaos") and item.nodeid not in kept]
    items[:] = [item for item in items if item not in left]
    config.hook.pytest_deselected(items=left)
