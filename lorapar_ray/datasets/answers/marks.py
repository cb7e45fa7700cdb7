"""Finds the final answer in a text.

Exact marks first: `\\boxed{}`, `<answer>` tags, GSM8K's last line `#### N`. Without such a mark, heuristics are used;
each docstring says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from lorapar_ray.datasets.answers.pairs import pairs
from lorapar_ray.datasets.answers.writing import plain_characters

_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=\{|[^\s{])")
_TAG = re.compile("<answer>", re.IGNORECASE)
_TAG_END = re.compile("</answer>", re.IGNORECASE)
_HASHES = re.compile(r"^[ \t]*+####(?!#)[ \t]*+(\S.*)$", re.MULTILINE)
_NUMBER_ONLY = re.compile(r"[-+$€£\s]*(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:\s*/\s*\d+)?\s*%?\.?")
_NUMBER_FIRST = re.compile(r"[-+$€£\s]*(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?!\d*[.):]\s)")
_PHRASE = re.compile(r"\banswers?\b(?:\s+(?:is|was|equals|would be|must be|comes to)\b\s*:?|\s*[:=])", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|\n")
_REASON = re.compile(r"(?:,|(?<!\s))\s++(?:because|since)\b", re.IGNORECASE)
_MATH = re.compile(r"\\[(\[]|\$\$|(?<!\\)\$(?!\s)([^$\n]++)(?<![\s\\])\$(?!\d)")
_MATH_END = {"\\(": "\\)", "\\[": "\\]", "$$": "$$"}
_COMMAND = re.compile(r"\\[A-Za-z]+")
_COMMAND_OF = re.compile(r"\\[A-Za-z]+(\{[^}]*\})?")
_WORDS = re.compile(r"[A-Za-z]{2} ")
_DIGIT = re.compile(r"\d")
_MAX_NESTED = 4
"""Marks within marks, such as a box in an answer tag."""


@dataclass(frozen=True)
class Span:
    """A part of a text that holds the answer."""

    text: str
    marked: bool
    """The mark contains only the answer: a box, a tag, a `####` line or a formula."""


def final_answer(text: str) -> str:
    """The text of the final answer: the content of the last mark, else the result of a heuristic, else the whole
    text."""
    return final_span(text).text


def final_span(text: str) -> Span:
    """See `final_answer`."""
    text = _after_thinking(text)
    marked = False
    for _ in range(_MAX_NESTED):
        marks = list(_marks(text))
        if not marks:
            break
        text, marked = max(marks)[1], True
    found = _phrase(text) or _formula(text)
    return Span(found.text if found else text.strip(), marked or (found is not None and found.marked))


def _after_thinking(text: str) -> str:
    """The text after a reasoning model's `</think>`, if it is not empty."""
    after = text.rpartition("</think>")[2]
    return after if after.strip() else text


def _marks(text: str) -> Iterator[tuple[int, str]]:
    """(end, content) of every mark.

    A `####` line counts as a mark if it contains only a number. Without other marks it may also
    contain a number with its unit, or be the last line; else it is a Markdown heading (`#### Step 2`).
    """
    end = 0
    for box in _BOX.finditer(text):
        if box.start() >= end:
            end, inside = _boxed(text, box.end())
            yield end, inside
    tags = [(closed.end(), text[opened.end() : closed.start()]) for opened, closed in pairs(text, _TAG, _TAG_END)]
    yield from tags
    lines = [(line.end(), line.group(1).rstrip(" \t")) for line in _HASHES.finditer(text)]
    yield from (line for line in lines if _NUMBER_ONLY.fullmatch(plain_characters(line[1])))
    if lines and not tags and not _BOX.search(text):
        last = lines[-1]
        numbered = [line for line in lines if _NUMBER_FIRST.match(plain_characters(line[1]))]
        yield from [last] if not text[last[0] :].strip() else numbered[-1:]


def _boxed(text: str, start: int) -> tuple[int, str]:
    """The braces that begin at `start`, nested ones inside; else one word; unclosed ones end with the text."""
    if text[start] != "{":
        word = text[start:].split(maxsplit=1)[0]
        return start + len(word), word
    depth = 0
    for place in range(start, len(text)):
        character = text[place]
        if character in "{}" and text[place - 1] != "\\":
            depth += 1 if character == "{" else -1
            if depth == 0:
                return place + 1, text[start + 1 : place]
    return len(text), text[start + 1 :]


def _phrase(text: str) -> Span | None:
    """Heuristic: what follows the last "answer is" or "answer:" in its sentence, without the reason given for it."""
    found = list(_PHRASE.finditer(text))
    if not found:
        return None
    rest = text[found[-1].end() :].lstrip("*_ \t\r\n")
    sentence = rest[: end.start()] if (end := _SENTENCE_END.search(rest)) else rest
    sentence = sentence[: reason.start()] if (reason := _REASON.search(sentence)) else sentence
    sentence = sentence.strip(" *_:")
    return (_formula(sentence) or Span(sentence, False)) if sentence else None


def _formula(text: str) -> Span | None:
    """Heuristic: the last formula (`$…$`, `\\(…\\)`), if no number comes after it; `$5 and $10` are no formulas."""
    found = list(_formulas(text))
    if not found or _DIGIT.search(text, found[-1][0]):
        return None
    inside = found[-1][1]
    return Span(inside.strip(), True) if not _WORDS.search(_without_commands(inside)) else None


def _formulas(text: str) -> Iterator[tuple[int, str]]:
    """(end, content) of every formula."""
    place, unclosed = 0, set()
    while opened := _MATH.search(text, place):
        mark, place = opened.group(), opened.end()
        if (inside := opened.group(1)) is not None:
            yield place, inside
            continue
        closed = -1 if mark in unclosed else text.find(_MATH_END[mark], place + 1)
        if closed < 0:
            unclosed.add(mark)  # the rest of the text is not read again for each
            place = opened.start() + 1
        else:
            yield closed + len(mark), text[place:closed]
            place = closed + len(mark)


def _without_commands(formula: str) -> str:
    """The text without LaTeX commands and their first argument, as far as braces are closed."""
    closed, brace, rest = formula.rpartition("}")
    return _COMMAND_OF.sub("", closed + brace) + _COMMAND.sub("", rest)
