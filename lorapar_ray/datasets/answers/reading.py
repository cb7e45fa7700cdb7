"""Reads an answer as a number: strictly if it stands alone, with heuristics inside prose."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lorapar_ray.datasets.answers.arithmetic import NotANumberError, Number, TooBigError, number_of
from lorapar_ray.datasets.answers.marks import final_span
from lorapar_ray.datasets.answers.tokens import Token, tokens_of
from lorapar_ray.datasets.answers.writing import plain_writing

MAX_TEXT = 100_000
"""Number of characters that are read, from the end of the text."""
_TIMES = re.compile(r"(?<=\d)\s*x\s*(?=\d)")
_UNIT_POWER = re.compile(r"(?<=[A-Za-z])(\s*+)(?:\^|\*\*)\s*+(?:\{\s*+)?+-?\d++\s*\}?(?![\d^])")
_APART_SIGN = re.compile(r"((?:[=({:]|\bis)\s*)-\s+(?=[\d.$\\])")
_MINUS = re.compile(r"\b(?:minus|negative)\s+(?=[\d.$])", re.IGNORECASE)
_ABBREVIATED = re.compile(r"\b(Rs|approx|No|ca)\.(?=\s?\d)", re.IGNORECASE)
_AND_FRACTION = re.compile(r"(?<=\d)\s+and\s+(?=\d+\s*/\s*\d+(?![\d/]))")
_SPACED_GROUPS = re.compile(r"[-+]?\d{1,3}(?: \d{3})+(?:\.\d+)?")
_PROSE = re.compile(r"[^\W\d_]{2,}")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_CURRENCIES = frozenset({"usd", "eur", "gbp", "inr", "rs", "cad", "aud", "us"})
_FUNCTIONS = frozenset(
    ("log", "ln", "exp", "sin", "cos", "tan", "cot", "sqrt", "max", "min", "gcd", "lcm", "abs", "mod")
)
_UNIT_LETTERS = frozenset("mgshlnjwvakcf")
"""One letter after a number that is a unit (metres, grams, …); any other is a variable, so that `2x` is not 2."""
_CHOICES = frozenset({"or", "and", "to"})
"""Between two numbers they mean several answers: `6 or 7` is neither 6 nor 7."""
_RUN = frozenset({"number", "operator", "open", "close", "fraction", "percent", "scale", "command"})


@dataclass(frozen=True)
class Answer:
    """The final answer of a text."""

    text: str
    """Its position."""
    number: Number | None
    """Its value; None if it is not a number, or one of several."""
    alone: bool
    """`text` is the answer and nothing else, not a sentence around it."""
    too_big: bool = False
    """Whether it is a number with more than MAX_DIGITS digits."""


def read_answer(text: str) -> Answer:
    """The final answer of a text (see `final_answer`), as a number if it is one."""
    text = text[-MAX_TEXT:]
    span = final_span(text)
    alone = span.marked or not is_prose(span.text)
    try:
        if (number := _strict(span.text, span.marked)) is not None:
            return Answer(span.text, number, alone=True)
        if alone:  # sums without words: the last line has the result
            last = span.text.rpartition("\n")[2]
            return Answer(last, None if last == span.text else _strict(last, span.marked), alone=True)
        found = _last_in_prose(span.text)
        if found is None and span.text != text.strip():
            found = _last_in_prose(text)
    except TooBigError:
        return Answer(span.text, None, alone, too_big=True)
    return Answer(span.text, found, alone=False)


def is_prose(text: str) -> bool:
    """Whether a text has words: LaTeX commands are not words, units after a number are."""
    return _PROSE.search(_COMMAND.sub(" ", text)) is not None


def _plain(text: str) -> str:
    text = _MINUS.sub("-", _ABBREVIATED.sub(r"\1 ", text))
    text = _AND_FRACTION.sub(" ", text)
    text = _APART_SIGN.sub(r"\1-", _TIMES.sub("*", plain_writing(text)))
    return _UNIT_POWER.sub(r"\1", text)


def _strict(text: str, marked: bool) -> Number | None:
    """The number of a text with one number or sum, optionally after a name and before a unit or a remark.

    `marked`: a closing `!` is a factorial, which is not a sum; else it is punctuation.
    """
    plain = _plain(text).strip(" \t\r\n|[]\"'").rstrip(" .,;:|[]\"'" + ("" if marked else "!")).lstrip(" ,;:!")
    if _SPACED_GROUPS.fullmatch(plain):
        plain = plain.replace(" ", "")
    parts = _without_remark(_after_equals(tokens_of(plain)))
    parts = _without_unit(_without_name(parts))
    try:
        return number_of(parts)
    except TooBigError:
        raise
    except NotANumberError:
        return None


def _after_equals(parts: Sequence[Token]) -> list[Token]:
    """The text after the last equals sign; the text before it if no number follows (`42 = x`)."""
    end, number = len(parts), False
    for index in reversed(range(len(parts))):
        number = number or parts[index].kind == "number"
        if parts[index].kind == "equals":
            if number:
                return list(parts[index + 1 : end])
            end = index
    return list(parts[:end])


def _without_remark(parts: list[Token]) -> list[Token]:
    """The text without a remark such as `(2 per day)` after the number."""
    if not parts or parts[-1].text != ")":
        return parts
    start = next((index for index in reversed(range(len(parts) - 1)) if parts[index].text in ("(", ")")), 0)
    if not start or parts[start].text != "(" or parts[start - 1].kind not in ("number", "word", "percent"):
        return parts
    return parts[:start] if any(each.kind == "word" for each in parts[start + 1 : -1]) else parts


def _without_name(parts: list[Token]) -> list[Token]:
    """The text without the words before the number; a variable, or a word in a sum, stays, so the text is not a
    number."""
    start = 0
    while start < len(parts) and (parts[start].kind == "word" or parts[start].text in (":", ",", ".", "#", '"')):
        start += 1
    if start == 0 or start == len(parts):
        return parts
    last, first = parts[start - 1], parts[start]
    named = last.kind != "word" or last.text.lower() in _CURRENCIES or not last.text.isascii()
    if not named and (len(last.text) == 1 or last.touches(first) or last.text.lower() in _FUNCTIONS):
        return parts
    if first.kind == "operator" and (
        last.touches(first) or len(parts) == start + 1 or not first.touches(parts[start + 1])
    ):
        return parts
    return parts[start:] if first.kind != "command" else parts


def _without_unit(parts: list[Token]) -> list[Token]:
    """The text without the unit after the number: words, also with `/` and `*` between them."""
    end = len(parts)
    while end > 1:
        last, before = parts[end - 1], parts[end - 2]
        joins = last.text in ("/", "*") and end < len(parts) and before.kind in ("word", "number")
        if not (last.kind == "word" or last.text in (",", ".", ";", ":", "'", '"') or joins):
            break
        if last.kind == "word" and is_variable(last.text):
            return list(parts)
        end -= 1
    return parts[:end]


def is_variable(word: str) -> bool:
    """Whether a word after a number means another number."""
    return len(word) == 1 and word.isascii() and word.lower() not in _UNIT_LETTERS


def _last_in_prose(text: str) -> Number | None:
    """Heuristic: the last number of a text, with the sum that it is part of; None if that has variables or commas."""
    parts = tokens_of(_plain(text))
    for index in reversed(range(len(parts))):
        if parts[index].kind == "number" and not _glued(parts, index):
            try:
                return number_of(_run_around(parts, index))
            except TooBigError:
                raise
            except NotANumberError:
                return None
    return None


def _glued(parts: Sequence[Token], index: int) -> bool:
    """The digit of a name, such as H2O."""
    before = parts[index - 1] if index else None
    glued = before is not None and before.kind == "word" and before.touches(parts[index]) and before.text.isascii()
    return glued and before is not None and before.text.lower() not in _CURRENCIES


def _run_around(parts: Sequence[Token], index: int) -> Sequence[Token]:
    """The sum that the number at `index` is part of.

    Raises:
        NotANumberError: it is part of something else, such as `2x`, `x + 1`, `(1, 4)` or `3 or 4`.
    """
    start, end = index, index + 1
    while start and parts[start - 1].kind in _RUN:
        start -= 1
    while end < len(parts) and parts[end].kind in _RUN:
        end += 1
    before = parts[start - 1] if start else None
    after = parts[end] if end < len(parts) else None
    if before is not None and before.text.lower() in _FUNCTIONS:
        raise NotANumberError("the argument of a function")
    if _follows_a_choice(parts, start):
        raise NotANumberError("one of several")
    closings = sum((part.text in ")}") - (part.text in "({") for part in parts[start:end])
    if before is not None and before.text == "," and closings > 0:
        raise NotANumberError("one of several")
    while parts[start].kind in ("operator", "close", "percent", "scale"):
        first = parts[start]
        joined = before is not None and before.kind in ("word", "close") and before.touches(first)
        if first.text in ("+", "-") and first.touches(parts[start + 1]) and not joined:
            break  # a sign
        if first.kind == "operator" and before is not None and before.kind == "word" and len(before.text) == 1:
            raise NotANumberError("part of an expression")
        start += 1
    while parts[end - 1].kind in ("operator", "open"):
        if after is not None and after.kind == "word" and is_variable(after.text):
            raise NotANumberError("part of an expression")
        end -= 1
    if after is not None and after.kind == "word" and parts[end - 1].touches(after) and is_variable(after.text):
        raise NotANumberError("a multiple of a variable")
    run = list(parts[start:end])
    while run and run[0].kind == "open" and closings < 0:
        run, closings = run[1:], closings + 1
    while run and run[-1].kind == "close" and closings > 0:
        run, closings = run[:-1], closings - 1
    return run


def _follows_a_choice(parts: Sequence[Token], start: int) -> bool:
    """Whether the text at `start` is the second number of `6 or 7`, `3 to 5 hours` or `6 apples or 7`."""
    if start < 2 or parts[start - 1].text.lower() not in _CHOICES:
        return False
    earlier = parts[start - 2]
    unit = parts[start - 1].text.lower() == "or" and earlier.kind == "word" and start > 2
    return (parts[start - 3] if unit else earlier).kind in ("number", "percent", "close")
