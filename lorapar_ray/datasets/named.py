"""Known benchmarks: their hub names, and the conversion of their records to questions.

Formats are those of the published files; a record is (prompt, response, answer). A record without a question has an
empty prompt, and is rejected.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

Record = dict[str, Any]
Triple = tuple[str, str, str]
LETTERS = "ABCDEFGHIJ"
_TRUTH = {"true": "yes", "yes": "yes", "1": "yes", "false": "no", "no": "no", "0": "no"}


@dataclass(frozen=True)
class NamedDataset:
    """A benchmark's hub name and the reader of its records."""

    hub_name: str
    convert: Callable[[Record], Triple]
    hub_config: str | None = None


def gsm8k(record: Record) -> Triple:
    """`answer` ends in `#### N`; the calculator marks `<<a*b=c>>` are not for a language model."""
    solution, final = record["answer"].rsplit("####", 1)
    return record["question"], re.sub(r"<<.*?>>", "", solution).strip() + f"\n#### {final.strip()}", final.strip()


def boolq(record: Record) -> Triple:
    """`passage` and `question` with a boolean, or the instruction form with `answer` as text."""
    if "passage" in record:
        answer, passage, question = _truth(record["answer"]), _text(record, "passage"), _text(record, "question")
        asked = f"Question: {question.removesuffix('?')}?" if question.strip() else ""
        return f"{passage}\n\n{asked}" if asked and passage.strip() else asked, answer, answer
    answer = record["answer"]
    return record["instruction"], answer, answer


def mawps(record: Record) -> Triple:
    """Any of its published forms: `instruction`, `Question` or `original_text` with the number itself, or
    `sQuestion`/`lSolutions` of the original release."""
    for question, result in (("instruction", "answer"), ("original_text", "ans")):
        if question in record:
            answer = _number(record[result])
            return record[question], answer, answer
    if "Question" in record:  # numbers are replaced in the text and listed separately
        text, answer = _text(record, "Question"), _number(record["Answer"])
        for index, value in enumerate(str(record["Numbers"]).split()):
            text = re.sub(rf"\b(?:number|N_?0*){index}\b", _number(value), text)
        return text, answer, answer
    answer = _number(record["lSolutions"][0])
    return record["sQuestion"], answer, answer


def svamp(record: Record) -> Triple:
    """`Body`, `Question` and a numeric `Answer`."""
    answer, body, question = _number(record["Answer"]), _text(record, "Body"), _text(record, "Question").strip()
    return f"{body.strip().removesuffix('.')}. {question}" if question and body.strip() else question, answer, answer


def mmlu(record: Record) -> Triple:
    """`question`, `choices` and the index (or letter) of the right one."""
    choices = record["choices"]
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
        raise ValueError(f"'choices' must list 2 to {len(LETTERS)} options")
    if not all(isinstance(each, str) for each in choices):
        raise ValueError("'choices' must be text")
    letter = LETTERS[_index(record["answer"], len(choices))]
    question = _text(record, "question")
    options = "\n".join(f"{name}. {text}" for name, text in zip(LETTERS, choices, strict=False))
    asked = f"{question}\n{options}\nAnswer with the letter only." if question.strip() else ""
    return asked, letter, letter


def dolly(record: Record) -> Triple:
    """`instruction`, optional `context`, `response`."""
    context = (record.get("context") or "").strip()
    asked = _text(record, "instruction")
    prompt = f"{context}\n\n{asked}" if context and asked.strip() else asked
    response = record["response"] if "response" in record else record["output"]
    return prompt, response, response


def alpaca(record: Record) -> Triple:
    """`instruction`, optional `input`, `output`: OpenPlatypus and CodeAlpaca."""
    extra = (record.get("input") or "").strip()
    asked = _text(record, "instruction")
    prompt = f"{asked}\n\n{extra}" if extra and asked.strip() else asked
    return prompt, record["output"], record["output"]


def codefeedback(record: Record) -> Triple:
    """`query` and `answer` of CodeFeedback-Filtered-Instruction."""
    return record["query"], record["answer"], record["answer"]


def _text(record: Record, column: str) -> str:
    """A part of a prompt; "" for null. Other values would enter the prompt as Python writes them."""
    value = record[column]
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"'{column}' must be text, not of type {type(value).__name__}")
    return str(value)


def _truth(value: Any) -> str:
    word = str(value).strip().lower() if isinstance(value, str | bool | int) else ""
    if word not in _TRUTH:
        raise ValueError(f"'answer' must be a boolean, yes or no, not {value!r}")
    return _TRUTH[word]


def _index(answer: Any, choices: int) -> int:
    """Position of an option that is given as an index or a letter."""
    text = str(answer).strip().upper()
    index = LETTERS.find(text) if len(text) == 1 and text.isalpha() else int(text) if text.isdecimal() else -1
    if isinstance(answer, bool) or not 0 <= index < choices:
        raise ValueError(f"'answer' {answer!r} is not one of the {choices} choices")
    return index


def _number(value: Any) -> str:
    """A number as text: without an exponent, and without `.0`."""
    if isinstance(value, bool):
        raise ValueError("the answer is a boolean")
    try:
        number = Decimal(str(value).strip().replace(",", ""))
    except InvalidOperation as error:
        raise ValueError(f"the answer {value!r} is no number") from error
    if not number.is_finite() or abs(number.adjusted()) > 300:
        raise ValueError(f"the answer {value!r} is not a finite number")
    whole = number.to_integral_value()
    return format(whole if whole == number else number, "f")


NAMED: dict[str, NamedDataset] = {
    "gsm8k": NamedDataset("openai/gsm8k", gsm8k, "main"),
    "boolq": NamedDataset("google/boolq", boolq),
    "mawps": NamedDataset("mwpt5/MAWPS", mawps),
    "svamp": NamedDataset("ChilleD/SVAMP", svamp),
    "mmlu": NamedDataset("cais/mmlu", mmlu, "all"),
    "dolly": NamedDataset("databricks/databricks-dolly-15k", dolly),
    "openplatypus": NamedDataset("garage-bAInd/Open-Platypus", alpaca),
    "codealpaca": NamedDataset("sahil2801/CodeAlpaca-20k", alpaca),
    "codefeedback": NamedDataset("m-a-p/CodeFeedback-Filtered-Instruction", codefeedback),
}
