"""Whether an answer equals the reference: exact checks first, then heuristics, marked as such."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

from lorapar_ray.datasets.answers.arithmetic import Number
from lorapar_ray.datasets.answers.marks import final_answer
from lorapar_ray.datasets.answers.reading import Answer, is_prose, read_answer
from lorapar_ray.datasets.answers.writing import plain_characters, plain_writing, without_markdown

Equal = Callable[[str, str], bool]
"""Whether two mathematical expressions are equal; the reference first."""

_EXPRESSION = re.compile(r"[\\^()\[\]{}=<>]|\d")
_SIGNIFICANT = 6
_FLOAT_NOISE = 15
_TRUTH = {"yes": True, "true": True, "no": False, "false": False}
_FIRST_WORD = re.compile(r"[A-Za-z]+")


def same_number(text: str, want: str, equal_expressions: Equal) -> bool:
    """Whether the final answer of `text` has the value of the reference `want`.

    In this order: equal text; the same number, exactly; a rounded form of it (`close`); and, if one of the two is an
    expression (`\\sqrt{16}`), the result of `equal_expressions`. An ambiguous text equals only the same
    text: in `1,5` the comma may be a decimal point or may separate two numbers.

    A percent sign counts: 25% is 0.25. The sign may be omitted for numbers above 1, which cannot be a share: 25% equals
        25 too, but 0.5% is 0.005 and not 0.5.
    """
    gold, guess = read_answer(want), read_answer(text)
    if _squeezed(gold.text) == _squeezed(guess.text):
        return bool(_squeezed(gold.text))
    if gold.too_big or guess.too_big:
        return False
    if gold.number is not None and guess.number is not None:
        return any(close(ours, theirs) for ours, theirs in _readings(gold.number, guess.number))
    ours, theirs = _expression(gold), _expression(guess)
    if ours is None or theirs is None:
        return False
    return equal_expressions(ours, theirs)


def _readings(gold: Number, guess: Number) -> list[tuple[Number, Number]]:
    """Possible readings of the two, as pairs to compare."""
    as_shares = (_share(gold), _share(guess))
    if gold.percent == guess.percent or abs((gold if gold.percent else guess).value) <= 1:
        return [as_shares]
    return [as_shares, (gold, guess)]


def _share(number: Number) -> Number:
    """25% as 0.25."""
    decimals = None if number.decimals is None else number.decimals + 2
    return Number(number.value / 100, decimals=decimals) if number.percent else number


def close(gold: Number, guess: Number) -> bool:
    """Whether two values are equal, or one is the other rounded: to six digits or more, or by a float's error.

    The latter are heuristics.
    """
    if gold.value == guess.value:
        return True
    return _rounds_to(gold.value, guess.value, gold.decimals) or _rounds_to(guess.value, gold.value, guess.decimals)


def _rounds_to(short: Fraction, long: Fraction, decimals: int | None) -> bool:
    """Whether `short`, with its number of decimals, is `long` rounded."""
    if not decimals or short == 0:
        return False
    significant = len(str(abs(short.numerator * 10**decimals // short.denominator)))
    if significant >= _FLOAT_NOISE:  # 56.300000000000004
        return abs(short - long) <= abs(long) * Fraction(1, 10**12)
    return significant >= _SIGNIFICANT and 2 * abs(short - long) <= Fraction(1, 10**decimals)


def same_text(text: str, want: str) -> bool:
    """Whether the final answer is the reference's text, up to case, space, emphasis and closing punctuation.

    Heuristic for a reference of yes, no, true or false: the first word of the final answer decides.
    """
    ours, theirs = _normal(text), _normal(want)
    if ours == theirs or _plain_words(text) == _plain_words(want):
        return True
    truth = _TRUTH.get(theirs)
    first = _FIRST_WORD.match(ours)
    return truth is not None and first is not None and _TRUTH.get(first.group()) is truth


def _expression(answer: Answer) -> str | None:
    """The text for a parser of mathematics; None for words."""
    if answer.alone and not is_prose(answer.text) and _EXPRESSION.search(answer.text):
        return plain_characters(answer.text).strip(" .")
    return None if answer.number is None else str(answer.number.value)


def _squeezed(text: str) -> str:
    return re.sub(r"\s+", "", plain_writing(text)).strip("$").rstrip(".").strip("$")


def _normal(text: str) -> str:
    return _plain_words(final_answer(text))


def _plain_words(text: str) -> str:
    return " ".join(without_markdown(text).split()).rstrip(".!").strip("\"'“”").rstrip(".!").casefold()
