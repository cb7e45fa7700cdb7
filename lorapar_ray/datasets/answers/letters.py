"""The option letter that an answer chooses."""

from __future__ import annotations

import re

from lorapar_ray.datasets.answers.marks import final_span
from lorapar_ray.datasets.answers.writing import without_markdown

_TEXTBOX = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}")
_WHOLE = re.compile(r"[^\w]*([A-Ja-j])[^\w]*")
_LEADING = re.compile(r"\s*(?:[(\[]\s*([A-Ja-j])\s*[)\]]|([A-Ja-j])\s*[).:]|([A-J])\s*(?:$|[,;\n–—-]))")
_LEADS = r"(?:is|are|be|choose|chose|pick|select|option|choice|answer)"
_CHOSEN = re.compile(
    rf"\b{_LEADS}\b\s*(?:the\s+)?(?:option|choice|letter)?\s*(?:is\s+)?[:=]?\s*[\"'(\[]*([A-J])\b(?!['’]\w)",
    re.IGNORECASE,
)
_PRAISED = re.compile(
    r"(?<![\w'])([A-J])[)\].\"']*\s+(?:is|must be|seems|looks)\s+(?:the\s+)?(?:right|correct|best|true)\b"
)
_CONCLUDED = re.compile(r"\b(?:so|thus|hence|therefore)\b[,:]?\s+(?:it\s+is\s+|it's\s+)?[\"'(\[]*([A-J])\b(?!['’]\w)")
_ALONE = re.compile(r"(?<![\w'’])([A-J])(?![\w]|['’]\w)")
_ARTICLE = re.compile(r"[AI]\s+(?!(?:because|since|as|is|and|or|which|due|for|but|was|would)\b)[a-z]")
_WORD = re.compile(r"[AI]\s+[A-Za-z]")
_NOT = re.compile(r"\b(?:not|isn't|never)\s+[\"'(\[]*$", re.IGNORECASE)


def option_letter_in(text: str) -> str | None:
    """The letter (A to J, in upper case) that a text chooses; None if there is none.

    Exact: a marked answer, or a text that is a letter or begins with one (`B`, `(b)`, `B. Paris`). Heuristics, in this
    order: the letter after the last "answer is", "choice is", "so"; the letter called right; the first letter that
    stands alone. The article "A" and the pronoun "I" are no letters.
    """
    span = final_span(text)
    inside = without_markdown(_TEXTBOX.sub(r"\1", span.text)).strip(" $")
    if found := _WHOLE.fullmatch(inside):
        return found.group(1).upper()
    if (found := _LEADING.match(inside)) and not _WORD.match(inside):
        return str(next(filter(None, found.groups()))).upper()
    for part in (inside, without_markdown(text)):
        if letter := _chosen(part):
            return letter
    return None


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
    return text[place].isupper() and not _ARTICLE.match(text, place) and not _NOT.search(text, 0, place)
