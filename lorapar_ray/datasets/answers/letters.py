"""The option letter that an answer chooses."""

from __future__ import annotations

import re

from lorapar_ray.datasets.answers.marks import final_span
from lorapar_ray.datasets.answers.writing import without_markdown

_TEXTBOX = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}")
_WHOLE = re.compile(r"[^\w]*([A-Ja-j])[^\w]*")
_LEADING = re.compile(r"\s*(?:[(\[]\s*([A-Ja-j])\s*[)\]]|([A-Ja-j])\s*[).:]|([A-J])\s*(?:$|[,;\n–—-]))")
_LEADS = r"(?:is|are|be|choose|chose|pick|select|option|choice|answer|leaving|leaves)"
_CHOSEN = re.compile(
    rf"\b{_LEADS}\b\s*+(?:the\s++)?+(?:option|choice|letter)?+\s*+(?:is\s++)?+[:=]?+\s*+[\"'(\[]*+([A-J])\b(?!['’]\w)",
    re.IGNORECASE,
)
_PRAISED = re.compile(
    r"(?<![\w'])([A-J])[)\].\"']*\s+(?:is|must be|seems|looks)\s+(?:the\s+)?(?:right|correct|best|true)\b"
)
_CONCLUDED = re.compile(r"\b(?:so|thus|hence|therefore)\b[,:]?\s+(?:it\s+is\s+|it's\s+)?[\"'(\[]*([A-J])\b(?!['’]\w)")
_ALONE = re.compile(r"(?<![\w'’])([A-J])(?![\w]|['’]\w)")
_ARTICLE = re.compile(r"[AI]\s+(?!(?:because|since|as|is|and|or|which|due|for|but|was|would)\b)[a-z]")
_WORD = re.compile(r"[AI]\s+[A-Za-z]")
_WRONG = re.compile(r"[\"')\].]*\s+(?:(?:is|are|was)\s+(?:not|wrong|incorrect|false|out)\b|(?:isn't|cannot|can't)\b)")
_WITH = r"(?:or|and|nor)"
_HEDGED = re.compile(rf"[\"')\].]*\s+{_WITH}\s+(?:option\s+)?[\"'(\[]*(?:[A-HJ]\b(?!['’]\w)|I\b(?!['’]\w|\s+[a-z]))")
_HEDGES = re.compile(rf"(?<![\w'])[A-J][\"')\].]*\s+{_WITH}\s+(?:option\s+)?[\"'(\[]*$")
_LISTED = re.compile(r"^[^\S\n]*+[(\[]?([A-Ja-j])[)\].:]", re.MULTILINE)
_NEARBY = 100
"""Characters before a letter that may refuse it: a text of letters alone would be read from its start for each."""
_NOT = re.compile(r"\b(?:not|isn't|never|cannot\s+be|can't\s+be)\s+[\"'(\[]*$", re.IGNORECASE)


def option_letter_in(text: str) -> str | None:
    """The letter (A to J, in upper case) that a text chooses; None if there is none.

    Exact: a marked answer, or a text that is a letter or begins with one (`B`, `(b)`, `B. Paris`). Heuristics, in this
    order: the letter after the last "answer is", "choice is", "so"; the letter called right; the first single letter.
        The article "A" and the pronoun "I" do not count, nor a letter that is called wrong, or one of several ("A or
        B").
    """
    span = final_span(text)
    inside = without_markdown(_TEXTBOX.sub(r"\1", span.text)).strip(" $")
    if found := _WHOLE.fullmatch(inside):
        return found.group(1).upper()
    if (found := _LEADING.match(inside)) and not _WORD.match(inside) and not _lists_options(inside):
        place = found.start(found.lastindex or 0)
        if not (_WRONG.match(inside, place + 1) or _HEDGED.match(inside, place + 1)):
            return inside[place].upper()
    for part in (inside, without_markdown(text)):
        part = _LISTED.sub("", part) if _lists_options(part) else part
        if letter := _chosen(part):
            return letter
    return None


def _lists_options(text: str) -> bool:
    """Whether the text repeats the question's options, one per line from A on."""
    return [line.group(1).upper() for line in _LISTED.finditer(text)][:2] == ["A", "B"]


def _chosen(text: str) -> str | None:
    for pattern in (_CHOSEN, _PRAISED, _CONCLUDED):
        found = [match for match in pattern.finditer(text) if _is_letter(text, match)]
        if found:
            return found[-1].group(1)
    alone = [match for match in _ALONE.finditer(text) if _is_letter(text, match)]
    sure = [match for match in alone if not _WORD.match(text, match.start(1))]
    return next((match.group(1) for match in [*sure, *alone]), None)


def _is_letter(text: str, match: re.Match[str]) -> bool:
    place = match.start(1)
    after = place + 1
    nearby = max(0, place - _NEARBY)
    refused = _NOT.search(text, nearby, place) or _HEDGES.search(text, nearby, place)
    refused = refused or _WRONG.match(text, after) or _HEDGED.match(text, after)
    return text[place].isupper() and not _ARTICLE.match(text, place) and not refused
