"""The plugin of the kill tests draws a sample of those that kill, and fails a test that has not seen its faults."""

import pytest

from tests.chaos import SEED

pytest_plugins = ["pytester"]
OPTIONS = ("-p", "tests.chaos", "-p", "no:cacheprovider", "-p", "no:xdist")
SEEDS = range(4)
MARKED = """
import pytest


@pytest.mark.chaos("score", "full disk")
def test_disk(recovery):
    with recovery("score", "full disk"):
        pass


@pytest.mark.chaos("score", "worker")
def test_worker(recovery):
    with recovery("score", "worker"):
        pass


@pytest.mark.chaos("score", "driver")
@pytest.mark.chaos("sft", "driver")
def test_of_two_stages(recovery):
    for stage in ("score", "sft"):
        with recovery(stage, "driver", "both"):
            pass


@pytest.mark.chaos("label", "driver")
@pytest.mark.chaos("label", "full disk")
def test_of_two_marks():
    pass


@pytest.mark.fault("evaluate", "engine child")
def test_engine(recovery):
    recovery.took(1.0, "evaluate", "engine child")


@pytest.mark.chaos("evaluate", "driver")
def test_driver(recovery):
    with recovery("evaluate", "driver"):
        pass
"""
UNSEEN = """
import pytest


@pytest.mark.fault("score", "worker", "driver")
def test_half(recovery):
    with recovery("score", "worker"):
        pass


@pytest.mark.fault("score", "worker")
def test_other(recovery):
    with recovery("score", "worker"), recovery("score", "out of memory"):
        pass


@pytest.mark.parametrize("stage", ["score", "sft"])
@pytest.mark.fault("score", "worker")
@pytest.mark.fault("sft", "worker")
def test_case(recovery, stage):
    with recovery(stage, "worker"):
        pass


@pytest.mark.chaos("label", "worker", "driver")
def test_drawn(recovery):
    with recovery("label", "driver"):
        pass
"""
ELSEWHERE = {
    "pytestmark": "pytestmark = pytest.mark.chaos('score', 'worker')\n\ndef test_it(): pass",
    "a class": "class TestIt:\n    @pytest.mark.fault('score', 'worker')\n    def test_it(self): pass",
    "a case": "@pytest.mark.parametrize('n', [pytest.param(1, marks=pytest.mark.fault('score', 'worker'))])\n"
    "def test_it(n): pass",
}


def test_the_sample_kills_something_of_each_stage(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    pytester.makepyfile(MARKED)
    for seed in SEEDS:  # the disk of score is drawn by one of them at least, if it may be
        monkeypatch.setenv(SEED, str(seed))
        lines = pytester.runpytest_inprocess(*OPTIONS, "--collect-only", "-q").outlines
        kept = [line.partition("::")[2] for line in lines if "::" in line]
        assert kept == ["test_worker", "test_of_two_marks", "test_engine"], seed


def test_a_passed_test_has_seen_every_fault_of_its_marks(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(UNSEEN)
    result = pytester.runpytest_inprocess(*OPTIONS)
    result.assert_outcomes(passed=3, failed=2)  # of the drawn one, a sample may see a part
    said = result.stdout.str()
    assert "marked with score, driver, whose recovery was not timed" in said
    assert "recovery of score, out of memory, was timed without a mark" in said
    result = pytester.runpytest_inprocess(*OPTIONS, "--chaos", "all")
    result.assert_outcomes(passed=2, failed=3)
    assert "marked with label, worker, whose recovery was not timed" in result.stdout.str()


@pytest.mark.parametrize("where", ELSEWHERE)
def test_marks_that_the_table_cannot_read_are_refused(where: str, pytester: pytest.Pytester) -> None:
    pytester.makepyfile("import pytest\n\n" + ELSEWHERE[where])
    result = pytester.runpytest_inprocess(*OPTIONS)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "the marks chaos and fault belong above a module's function" in result.stderr.str() + result.stdout.str()
