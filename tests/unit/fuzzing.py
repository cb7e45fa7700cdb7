"""Damaged and hostile inputs; each must be accepted, or refused with one line for the user."""

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from lorapar_ray.errors import UserError

WEIRD: list[Any] = [
    None, True, -1, 0, 1.5, 10**30, float("inf"), float("nan"), "", " ", "\x00", "half \ud83d emoji", "a\u2028b", "[/INST]",  # noqa: E501
    "$", "x" * 5000, "../..", "9" * 5000, [], {}, [None], [[]], {"": None}, {"a": {"b": []}}, "nan", "1e999", "é", "%s {} \\",  # noqa: E501
]  # fmt: skip
"""Values that a field of another type may hold."""
WHOLE = [
    b"", b"\n", b"\x00", b"{", b"[", b"[" * 100_000, b"{\"a\":" * 50_000, b"null", b"[]", b"{}", b"[{}]", b"[null]", b"1", b"\"",  # noqa: E501
    b"\xff\xfe", b"\xef\xbb\xbf{}", "é".encode("latin-1"), b"9" * 5000, b"[" + b"9" * 5000 + b"]", b"{\"prompt\": 1}\n", b"NaN",  # noqa: E501
    b"PAR1", b"PAR1PAR1", b"\x1f\x8b", b"\x1f\x8b\x08\x00" + bytes(16), b"\x00" * 100, b"\xff" * 8, b"\x08" + bytes(7) + b"{}      ",  # noqa: E501
    b"SQLite format 3\x00", b"\"\\ud83d\"", b"{\"a\": \"\\ud83d\"}", b"a: &a [*a]", b"!!python/object:os.system x", b"\x80\x04.",  # noqa: E501
]  # fmt: skip
"""Complete files of another kind."""


def fuzzed(examples: int) -> Callable[[Any], Any]:
    """Hypothesis with this number of inputs, the same on every machine."""
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    return settings(max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=checks)


def one_line_or_accepted(read: Callable[[], Any]) -> Any:
    """The result of `read`, or None if it raises a one-line error; any other exception is a failure."""
    try:
        return read()
    except UserError as error:
        said = str(error)
        assert said.strip() and len(said.splitlines()) == 1 and len(said) < 2000, said
        said.encode()
        return None


@st.composite
def damaged(draw: st.DrawFn, good: bytes) -> bytes:
    """A file that was truncated, overwritten at some bytes, or replaced."""
    how = draw(st.sampled_from(["cut", "stray", "stray", "insert", "drop", "double", "whole", "noise"]))
    at = draw(st.integers(0, max(0, len(good) - 1)))
    if how == "cut":
        return good[:at]
    if how == "whole":
        return draw(st.sampled_from(WHOLE))
    if how == "noise":
        return draw(st.binary(max_size=300))
    if how == "double":
        return good + good[at:]
    stray = draw(st.binary(min_size=1, max_size=8))
    if how == "insert":
        return good[:at] + stray + good[at:]
    return good[:at] + (b"" if how == "drop" else stray) + good[at + len(stray) :]


@st.composite
def changed(draw: st.DrawFn, good: Any) -> Any:
    """A JSON-like value in which some values have another type, are missing, or have another name."""
    tree = copy.deepcopy(good)
    for _ in range(draw(st.integers(1, 2))):
        places = list(_places(tree))
        if not places:
            return tree
        node, key = draw(st.sampled_from(places))
        if draw(st.booleans()) or isinstance(node, list):
            node[key] = copy.deepcopy(draw(st.sampled_from(WEIRD)))
        else:
            value = node.pop(key)
            if draw(st.booleans()):
                node["unknown"] = value
    return tree


def damaged_json(good: Any) -> st.SearchStrategy[bytes]:
    """A damaged JSON file: as text, or in its values."""
    text = json.dumps(good, ensure_ascii=False).encode()
    return st.one_of(damaged(text), changed(good).map(lambda tree: json.dumps(tree).encode()))


def damaged_lines(good: list[Any]) -> st.SearchStrategy[bytes]:
    """A damaged file of JSON lines."""
    text = b"".join(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in good)
    lines = changed(good).map(lambda tree: b"".join(json.dumps(line).encode() + b"\n" for line in tree))
    return st.one_of(damaged(text), lines)


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield tree, key
            yield from _places(value)
    elif isinstance(tree, list):
        for index, value in enumerate(tree):
            yield tree, index
            yield from _places(value)
