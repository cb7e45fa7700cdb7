"""The exact value of a written number or of a sum of numbers, in rational arithmetic and within limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from lorapar_ray.datasets.answers.tokens import SCALES, Token

MAX_DIGITS = 1000
"""Longest number, also of a computed one; longer ones are not compared as numbers."""
_MAX_VALUE = 10**MAX_DIGITS
_MAX_PARTS = 400


class NotANumberError(ValueError):
    """These tokens are not a sum of numbers."""


class TooBigError(NotANumberError):
    """They are a number or a sum, with more than MAX_DIGITS digits."""


@dataclass(frozen=True)
class Number:
    """A value and how it was written."""

    value: Fraction
    """Without the percent sign: 25 for "25%"."""
    percent: bool = False
    decimals: int | None = None
    """Digits after the decimal point of a written number; None for fractions and sums."""


def number_of(tokens: Sequence[Token]) -> Number:
    """The value of all of the tokens.

    Raises:
        NotANumberError: they are neither a number nor a sum of numbers.
    """
    if not tokens or len(tokens) > _MAX_PARTS:
        raise NotANumberError("nothing to read" if not tokens else "too many parts")
    percent = tokens[-1].kind == "percent"
    parser = _Parser(tokens[:-1] if percent else tokens)
    value = parser.sum()
    if parser.place != len(parser.tokens):
        raise NotANumberError(parser.tokens[parser.place].text)
    written = [token for token in parser.tokens if token.kind not in ("open", "close")]
    signed = written[1:] if written[0].text in ("-", "+") else written
    decimals = _decimals(signed[0].text) if len(signed) == 1 else None
    return Number(value, percent, decimals)


def _decimals(text: str) -> int:
    digits, _, exponent = text.lower().partition("e")
    return max(0, len(digits.partition(".")[2]) - int(exponent or 0))


class _Parser:
    """Recursive descent: sum → product → power → atom."""

    def __init__(self, tokens: Sequence[Token]) -> None:
        self.tokens = tokens
        self.place = 0
        self._depth = 0

    def sum(self) -> Fraction:
        value = self._product()
        while sign := self._take("+", "-"):
            value = _bounded(value + self._product() if sign == "+" else value - self._product())
        return value

    def _product(self) -> Fraction:
        value = self._signed()
        while sign := self._take("*", "/"):
            value = _bounded(value * self._signed() if sign == "*" else _ratio(value, self._signed()))
        return value

    def _signed(self) -> Fraction:
        sign = self._take("+", "-")
        value = self._power()
        return -value if sign == "-" else value

    def _power(self) -> Fraction:
        base = self._atom()
        if self._take("^", "**") is None:
            return base
        self._deeper()
        sign = self._take("+", "-")
        exponent = self._power()
        self._depth -= 1
        return _power(base, -exponent if sign == "-" else exponent)

    def _atom(self) -> Fraction:
        token = self._next()
        if token.kind == "number":
            return self._mixed(_literal(token.text))
        if token.kind == "fraction":
            return _ratio(*self._operands())
        if token.kind == "open":
            self._deeper()
            value = self.sum()
            closing = self._next()
            if closing.text != {"(": ")", "{": "}"}[token.text]:
                raise NotANumberError(closing.text)
            self._depth -= 1
            return value
        raise NotANumberError(token.text)

    def _mixed(self, whole: Fraction) -> Fraction:
        """`3 1/2` and `3\\frac{1}{2}`, and `3 million`."""
        rest = self.tokens[self.place :]
        if rest and rest[0].kind == "scale":
            self.place += 1
            return _bounded(whole * SCALES[rest[0].text.lower().removesuffix("s")])
        if whole.denominator != 1 or not rest:
            return whole
        if rest[0].kind == "fraction":
            self.place += 1
            return _mixed(whole, _ratio(*self._operands()))
        if [token.kind for token in rest[:3]] == ["number", "operator", "number"] and rest[1].text == "/":
            self.place += 3
            return _mixed(whole, _ratio(_literal(rest[0].text), _literal(rest[2].text)))
        return whole

    def _operands(self) -> tuple[Fraction, Fraction]:
        """Of `\\frac`: two groups in braces, or two digits (`\\frac12`)."""
        token = self._peek()
        if token is not None and token.kind == "number" and token.text.isdigit() and len(token.text) == 2:
            self.place += 1
            return Fraction(int(token.text[0])), Fraction(int(token.text[1]))
        return self._atom(), self._atom()

    def _peek(self) -> Token | None:
        return self.tokens[self.place] if self.place < len(self.tokens) else None

    def _next(self) -> Token:
        token = self._peek()
        if token is None:
            raise NotANumberError("the end")
        self.place += 1
        return token

    def _take(self, *operators: str) -> str | None:
        token = self._peek()
        if token is None or token.kind != "operator" or token.text not in operators:
            return None
        self.place += 1
        return token.text

    def _deeper(self) -> None:
        self._depth += 1
        if self._depth > 50:
            raise NotANumberError("too deep")


def _literal(text: str) -> Fraction:
    digits, _, exponent = text.lower().partition("e")
    if len(digits) > MAX_DIGITS or len(exponent) > 5 or abs(int(exponent or 0)) > MAX_DIGITS:
        raise TooBigError(text[:20])
    return Fraction(text.replace(",", ""))


def _mixed(whole: Fraction, part: Fraction) -> Fraction:
    if not 0 < part < 1:
        raise NotANumberError("a mixed number's fraction is below 1")
    return whole + part


def _ratio(above: Fraction, below: Fraction) -> Fraction:
    if below == 0:
        raise NotANumberError("division by zero")
    return above / below


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise NotANumberError("a root")
    if base == 0 and exponent < 0:
        raise NotANumberError("division by zero")
    size = max(abs(base.numerator), base.denominator).bit_length()
    if base not in (0, 1, -1) and abs(exponent) * size > 4 * MAX_DIGITS:
        raise TooBigError("a power")
    return Fraction(base ** int(exponent if base not in (0, 1, -1) else exponent % 2 + 2 * (exponent > 0)))


def _bounded(value: Fraction) -> Fraction:
    if max(abs(value.numerator), value.denominator) > _MAX_VALUE:
        raise TooBigError("a result")
    return value
