"""Normalises the writing of an answer: digits, signs, spaces, LaTeX and Markdown."""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

_SIGNS = {
    **dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\ufe63\uff0d", "-"),
    **dict.fromkeys("\uff0b\ufe62", "+"),
    **dict.fromkeys("\u00d7\u22c5\u00b7\u2217", "*"),
    **dict.fromkeys("\u00f7\u2044\u2215\uff0f", "/"),
    "\uff0e": ".",
    "\uff0c": ",",
    "\uff05": "%",
    "\uff1d": "=",
    "\u2248": "=",
    "\uff08": "(",
    "\uff09": ")",
    "\u00b0": "",
    "\u221e": "\\infty ",
    "\u200b": "",
    "\ufeff": "",
}
_RAISED = dict(zip("\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b", "0123456789-", strict=True))
_RAISED_RUN = re.compile(f"[{''.join(_RAISED)}]+")
_GROUPING = re.compile(r"(?<=\d)(?:['\u2019_\u00a0\u2009\u202f\u2007]|\\[,!;:]|\\ |~)(?=\d{3}(?!\d))")
_EUROPEAN = re.compile(r"(?<![\d.,])(\d{1,3}(?:\.\d{3})+),(\d{1,2})(?![\d,])")
"""`1.234,56`: with both marks it is not ambiguous."""
_TEXT = re.compile(
    r"\\(?:text|textbf|textit|textrm|texttt|mathrm|mathbf|mathit|mathsf|operatorname|mbox|hbox)\s*\{([^{}]*)\}"
)
_MAX_NESTED = 8
"""Text boxes within text boxes."""
_LATEX = (
    (re.compile(r"\{,\}|,\\!"), ","),
    (re.compile(r"\\(?:left|right|displaystyle|limits|big|Big)(?![A-Za-z])"), ""),
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\^\s*+(?:\{\s*+)?+\\circ\s*\}?|\\degree(?![A-Za-z])"), ""),
    (re.compile(r"\\(?:times|cdot|ast)(?![A-Za-z])"), "*"),
    (re.compile(r"\\div(?![A-Za-z])"), "/"),
    (re.compile(r"\\(?:approx|simeq|equiv)(?![A-Za-z])"), "="),
    (re.compile(r"\\(?:pounds|euro|yen)(?![A-Za-z])"), "$"),
    (re.compile(r"\\([%$#&_])"), r"\1"),
    (re.compile(r"\\[,!;: ]|\\q?quad(?![A-Za-z])|~"), " "),
)
_MARKDOWN = (
    (re.compile(r"(?<![\w*])\*\*(?!\s)([^*\n]+)(?<!\s)\*\*(?![\w*])"), r"\1"),
    (re.compile(r"(?<![\w*])\*(?![\s*])([^*\n]+)(?<!\s)\*(?![\w*])"), r"\1"),
    (re.compile(r"(?<!\w)__(?!\s)([^_\n]+)(?<!\s)__(?!\w)"), r"\1"),
    (re.compile(r"`+"), ""),
)


def plain_characters(text: str) -> str:
    """Full-width and other scripts' digits, typographic signs and fractions as ASCII; other characters unchanged."""
    return "".join(_plain(character) for character in text)


def without_markdown(text: str) -> str:
    """The text without emphasis and code marks; `2**3` stays."""
    for pattern, by in _MARKDOWN:
        text = pattern.sub(by, text)
    return text


def plain_writing(text: str) -> str:
    """Characters, LaTeX spacing, text boxes and thousands separators in plain typed form."""
    text = _RAISED_RUN.sub(lambda run: "^" + "".join(_RAISED[each] for each in run.group()), text)
    text = plain_characters(_GROUPING.sub("", text))
    text = _EUROPEAN.sub(lambda found: f"{found[1].replace('.', '')}.{found[2]}", text)
    for pattern, by in _LATEX:
        text = pattern.sub(by, text)
    for _ in range(_MAX_NESTED):
        text = _TEXT.sub(r" \1 ", text)
    return without_markdown(_GROUPING.sub("", text))


def _plain(character: str) -> str:
    if character < "\u0080":
        return character
    if character in _SIGNS:
        return _SIGNS[character]
    if (digit := unicodedata.decimal(character, None)) is not None:
        return str(digit)
    if unicodedata.category(character) == "No" and 0 < (value := unicodedata.numeric(character, 0.0)) < 1:
        part = Fraction(value).limit_denominator(10)
        return f" {part.numerator}/{part.denominator}"  # ½, also in 3½
    return character
