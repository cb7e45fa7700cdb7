"""A pytest plugin for tests that kill processes, at moments and places drawn from a seed.

A test with the mark `chaos(stage, *faults)` draws from the fixture `chance`. A test with the mark `fault(stage,
*faults)` also injects a fault, and always runs. By default one drawn chaos test, or case of one, which kills a process
and is of one stage only, runs of each stage of which no fault test kills a process; `--chaos all` runs every one,
`--chaos-rounds N` runs each N times with different draws. The seed is printed; LORAPAR_CHAOS_SEED sets it.

The fixture `recovery` measures how long the work took to go on; the times are printed at the end. A test that passes
without a time for each of its marks fails: it has not seen that fault.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random, SystemRandom
from typing import Any

import pytest

from tests.chaos_table import cells_of

SEED = "LORAPAR_CHAOS_SEED"
RECOVERED = "recovered"
KILLS = {"worker", "coordinator", "Serve replica", "engine child", "reward process", "driver", "cluster"}
Seen = tuple[str, str]
"""A stage and what dies or breaks in it."""


class Recovery:
    """Notes how long the work took to go on after a fault."""

    def __init__(self, record: Callable[[str, object], None]) -> None:
        self._record = record

    @contextmanager
    def __call__(self, stage: str, fault: str, how: str = "") -> Iterator[None]:
        """Times a block, which ends when the work has continued.

        Args:
            fault: as in the test's mark.
            how: more about it, to be printed.
        """
        start = time.monotonic()
        yield
        self.took(time.monotonic() - start, stage, fault, how)

    def took(self, seconds: float, stage: str, fault: str, how: str = "") -> None:
        """A time that was measured before, as in a fixture of several tests."""
        self._record(RECOVERED, (stage, fault, how, seconds))


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
    """Times what follows a fault."""
    return Recovery(record_property)


def marks_of(item: pytest.Item) -> set[Seen]:
    """What a test is marked with; a case with the parameter `stage` or `fault` has those of its value."""
    case = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    return {
        (mark.args[0], fault)
        for mark in _marks(item)
        for fault in mark.args[1:]
        if case.get("stage", mark.args[0]) == mark.args[0] and case.get("fault", fault) == fault
    }


def untimed(marked: set[Seen], properties: Iterable[tuple[str, Any]], *, all_of_them: bool) -> str:
    """What is wrong with a passed test's times; empty if nothing is.

    Args:
        properties: of the test, with its times.
        all_of_them: whether it has to have seen every fault that it is marked with.
    """
    timed = {(value[0], value[1]) for name, value in properties if name == RECOVERED}
    wrong = [f"recovery of {stage}, {fault}, was timed without a mark" for stage, fault in sorted(timed - marked)]
    if all_of_them:
        wrong += [
            f"marked with {stage}, {fault}, whose recovery was not timed" for stage, fault in sorted(marked - timed)
        ]
    return "; ".join(wrong)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """A passed test fails if its times are not those of its marks; in a sample a test may draw some of its faults."""
    report = yield
    if call.when == "call" and report.passed:
        whole = item.config.getoption("--chaos") == "all" or not item.get_closest_marker("chaos")
        if wrong := untimed(marks_of(item), item.user_properties, all_of_them=whole):
            report.outcome, report.longrepr = "failed", wrong
    return report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The table of recovery times."""
    passed = terminalreporter.getreports("passed")
    rows = [value for report in passed for name, value in report.user_properties if name == RECOVERED]
    if rows:
        terminalreporter.section("recovery")
        for stage, fault, how, seconds in rows:
            terminalreporter.write_line(f"{stage:<10} {fault:<24} {seconds:6.1f} s  {how}".rstrip())


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    _require_table(items, config.rootpath)
    if config.getoption("--chaos") == "all":
        return
    always = [mark for item in items for mark in item.iter_markers("fault")]
    killed = {mark.args[0] for mark in always if not KILLS.isdisjoint(mark.args[1:])}
    by_stage: dict[str, list[str]] = {}
    for item in items:
        drawn = marks_of(item) if item.get_closest_marker("chaos") else set()
        stages, faults = {stage for stage, _ in drawn}, {fault for _, fault in drawn}
        if len(stages) == 1 and not KILLS.isdisjoint(faults):
            by_stage.setdefault(*stages, []).append(item.nodeid)
    draw = Random(os.environ[SEED])
    kept = {draw.choice(sorted(by_stage[stage])) for stage in sorted(by_stage.keys() - killed)}
    left = [item for item in items if item.get_closest_marker("chaos") and item.nodeid not in kept]
    items[:] = [item for item in items if item not in left]
    config.hook.pytest_deselected(items=left)


def _require_table(items: Iterable[pytest.Item], root: Path) -> None:
    """Each test has its marks where the table reads them.

    Raises:
        pytest.UsageError: names the test.
    """
    written: dict[Path, set[tuple[str, str, str]]] = {}
    for item in items:
        marked = {(mark.args[0], fault) for mark in _marks(item) for fault in mark.args[1:]}
        if not marked:
            continue
        if item.path not in written:
            written[item.path] = {(each.name, each.stage, each.fault) for each in cells_of(item.path, root)}
        name = getattr(item, "originalname", item.name)
        if marked != {(stage, fault) for test, stage, fault in written[item.path] if test == name}:
            raise pytest.UsageError(f"{item.nodeid}: the marks chaos and fault belong above a module's function")


def _marks(item: pytest.Item) -> list[pytest.Mark]:
    return [mark for name in ("chaos", "fault") for mark in item.iter_markers(name)]
