"""The sandbox with honest programs, and its verdicts; attacks are in test_sandbox_attacks.py."""

from __future__ import annotations

import ctypes
from collections import Counter, OrderedDict, deque, namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import IntEnum
from pathlib import Path
from typing import Any

import psutil
import pytest

from lorapar_ray.doctor import _sandbox
from lorapar_ray.errors import UserError
from lorapar_ray.sandbox import Job, Limits, Sandbox, choice, survey
from lorapar_ray.sandbox.examination import Examination
from lorapar_ray.sandbox.inside import wire
from lorapar_ray.sandbox.layers import Bubblewrap

PR_SET_CHILD_SUBREAPER = 36
LAYERS = [finding.name for finding in survey() if finding.layer is not None]


@pytest.fixture(scope="module", params=LAYERS)
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    with Sandbox(request.param, Limits(seconds=2.0)) as made:
        yield made


@contextmanager
def adopted_orphans() -> Iterator[Callable[[], list[str]]]:
    """Names of ended processes that were not reaped; orphans come to this process instead of process 1."""
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        children = psutil.Process().children
        yield lambda: [each.name() for each in children() if each.status() == psutil.STATUS_ZOMBIE]
    finally:
        libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


ADD = "def add(a, b):\n    return a + b\n"


@pytest.mark.slow
def test_verdicts_say_what_happened(sandbox: Sandbox) -> None:
    jobs = [
        Job(ADD, "assert add(2, 2) == 4", ("add",)),
        Job(ADD, "x = 1\nassert add(2, 2) == 5, 'sum'", ("add",)),
        Job(ADD, "add(1, 'a')", ("add",)),
        Job("def add(:", "add(1, 1)", ("add",)),
        Job("x = 1", "add(1, 1)", ("add",)),
        Job("import os\nos._exit(0)", "pass", ()),
        Job("raise SystemExit(0)", "pass", ()),
        Job("while True: pass", "pass", ()),
        Job(ADD, "assert add(1, 1) ==", ("add",)),
        Job(ADD, "assert helper(add(1, 1)) == 4", ("add",), setup="def helper(x): return 2 * x"),
    ]
    with adopted_orphans() as zombies:
        verdicts = sandbox.run(jobs)
        assert zombies() == [], "left to process 1, which counts them in the cgroup until it looks"
    assert [verdict.reason for verdict in verdicts] == [
        *("passed", "failed", "raised", "raised", "raised", "died", "raised", "timeout", "tests", "passed"),
    ]
    assert verdicts[1].detail == "AssertionError: sum at `assert add(2, 2) == 5, 'sum'`"
    assert verdicts[2].detail.startswith("TypeError: unsupported operand")
    assert verdicts[3].detail.startswith("SyntaxError")
    assert verdicts[4].detail.startswith("NameError: name 'add' is not defined")
    assert verdicts[5].detail == "the process ended by itself, status 0"
    assert verdicts[8].detail.startswith("the tests themselves fail: SyntaxError")


def test_output_is_kept_and_does_not_disturb(sandbox: Sandbox) -> None:
    code = "import sys\nprint('hello')\ndef f():\n    print('there', file=sys.stderr, flush=True)\n    return input\n"
    [verdict] = sandbox.run([Job(code + "sys.stdout.flush()", "assert f()", ("f",))])
    assert verdict.passed
    assert verdict.output == "hello\nthere\n"


def test_exceptions_reach_the_tests_as_built_in_ones(sandbox: Sandbox) -> None:
    code = "class Odd(KeyError): pass\nclass Own(BaseException): pass\ndef f(x):\n    raise {1: Odd, 2: Own}[x]('no')\n"
    tests = """
for x, kind in ((1, KeyError), (2, Exception), ([], TypeError)):
    try:
        f(x)
    except kind as error:
        pass
    else:
        raise AssertionError(x)
"""
    assert sandbox.run([Job(code, tests, ("f",))])[0].passed


Point = namedtuple("Point", "x y")


class Colour(IntEnum):
    RED = 1


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, 0, -7, 2**63, -(2**70), 0.1, float("inf"), 1e-320, 2 + 3j, "", "ü\ud800\x00", b"\x00a"),
        *([], [1, [2, "l"]], (), (1,), {1, 2}, frozenset({(1, 2)}), {(1, 2): [3], None: {}}, range(3, 9, 2), int, dict),
        *(deque([1, 2]), bytearray(b"x")),
    ],
)
def test_values_are_passed_unchanged(value: Any) -> None:
    import json

    back = wire.decode(json.loads(json.dumps(wire.encode(value))))
    assert back == value
    assert type(back) is type(value)


def test_other_values_are_passed_as_the_built_in_type() -> None:
    class Liar(list):  # type: ignore[type-arg]
        def __eq__(self, other: object) -> bool:
            return True

    def through(value: Any) -> Any:
        return wire.decode(wire.encode(value))

    assert through(Liar([1])) != [2]
    assert through(Counter("aab")) == {"a": 2, "b": 1}
    assert type(through(OrderedDict(a=1))) is dict
    assert through(Point(1, 2)) == (1, 2)
    assert type(through(Colour.RED)) is int
    assert list(through(x for x in (1, 2))) == [1, 2]
    assert through(10**5000) == 10**5000
    assert bool(through(object())) and through(object()) != through(object())


@pytest.mark.parametrize(
    "form",
    [
        [],
        {},
        [1],
        ["x", 1],
        ["l"],
        ["l", 3],
        ["d", [[1]]],
        ["d", [[["l", []], 1]]],
        ["i", "zz"],
        ["c", 1],
        ["y", "eval"],
    ],
)
def test_malformed_values_are_refused(form: Any) -> None:
    with pytest.raises(wire.WireError):
        wire.decode(form)


def test_only_bubblewrap_allows_processes(sandbox: Sandbox) -> None:
    code = "import os\ndef f():\n    r, w = os.pipe()\n    if os.fork() == 0:\n"
    code += "        os.write(w, b'7')\n        os._exit(0)\n    return int(os.read(r, 9))"
    job = Job(code, "assert f() == 7", ("f",))
    with Sandbox(sandbox.layer.name, Limits(processes=True), workers=1) as wide:
        if sandbox.layer.name == "bubblewrap":
            assert wide.run([job])[0].passed
        else:
            with pytest.raises(UserError, match="only bubblewrap can end"):
                wide.run([job])


@pytest.mark.slow
def test_tests_that_hang_cost_their_own_job_only(sandbox: Sandbox) -> None:
    with Sandbox(sandbox.layer.name, Limits(seconds=0.5), workers=1) as narrow:
        groups = list(narrow._all[0]._cgroup.folders)
        hang = Job(ADD, "while True: pass", ("add",))
        exits = Job(ADD, "import os\nos._exit(0)", ("add",))
        fits = Job(ADD, "assert add(2, 2) == 4", ("add",))
        huge = Job(ADD, "x = '" + "x" * wire.MAX_MESSAGE + "'", ("add",))
        reasons = [verdict.reason for verdict in narrow.run([hang, fits, exits, fits, huge, fits])]
        assert reasons == ["timeout", "passed", "tests", "passed", "tests", "passed"]
        assert narrow._all[0]._cgroup.folders == groups


def test_a_broken_binary_is_one_line(tmp_path: Path) -> None:
    binary = tmp_path / "bwrap"
    binary.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    binary.chmod(0o755)
    examination = Examination(Bubblewrap(str(binary)), Limits())
    with pytest.raises(
        UserError, match=r"bubblewrap cannot start a process: bwrap: No permissions to create new namespace$"
    ):
        examination.run(Job(ADD, "assert add(2, 2) == 4", ("add",)))


def test_no_layer_at_all_is_refused_with_the_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    found = tuple(replace(finding, layer=None, detail="broken") for finding in survey()[:2]) + survey()[2:]
    monkeypatch.setattr(choice, "survey", lambda: found)
    with pytest.raises(UserError, match=r"bubblewrap: broken; sandlock: broken\. Set sandbox\.layer: process"):
        choice.choose()
    assert choice.choose("process").name == "process"
    doctor = _sandbox()
    assert not doctor.ok
    assert doctor.detail == "not bubblewrap: broken; not sandlock: broken"
