"""Known benchmarks: the hub name each goes by and how one of its records becomes a question.

Formats are those of the published files; a record is (prompt, response, answer).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]
Triple = tuple[str, str, str]
LETTERS = "ABCDEFGH"


@dataclass(frozen=True)
class NamedDataset:
    """Where a benchmark lives and how to read one record."""

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
        answer = "yes" if record["answer"] in (True, "true", "True", 1) else "no"
        return f"{record['passage']}\n\nQuestion: {record['question']}?", answer, answer
    answer = str(record["answer"])
    return record["instruction"], answer, answer


def mawps(record: Record) -> Triple:
    """Any of its published forms: `instruction`, `Question` or `original_text` with the number itself, or
    `sQuestion`/`lSolutions` of the original release."""
    for question, result in (("instruction", "answer"), ("original_text", "ans")):
        if question in record:
            answer = _number(record[result])
            return record[question], answer, answer
    if "Question" in record:  # numbers are left out of the text and listed beside it
        text, answer = str(record["Question"]), _number(record["Answer"])
        for index, value in enumerate(str(record["Numbers"]).split()):
            text = re.sub(rf"\b(?:number|N_?0*){index}\b", _number(value), text)
        return text, answer, answer
    answer = _number(record["lSolutions"][0])
    return record["sQuestion"], answer, answer


def svamp(record: Record) -> Triple:
    """`Body`, `Question` and a numeric `Answer`."""
    answer = _number(record["Answer"])
    return f"{record['Body'].strip().removesuffix('.')}. {record['Question'].strip()}", answer, answer


def mmlu(record: Record) -> Triple:
    """`question`, four `choices` and the index (or letter) of the right one."""
    options = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, record["choices"], strict=False))
    letter = record["answer"] if isinstance(record["answer"], str) else LETTERS[record["answer"]]
    return f"{record['question']}\n{options}\nAnswer with the letter only.", letter, letter


def dolly(record: Record) -> Triple:
    """`instruction`, optional `context`, `response`."""
    context = (record.get("context") or "").strip()
    prompt = f"{context}\n\n{record['instruction']}" if context else record["instruction"]
    response = record.get("response") or record["output"]
    return prompt, response, response


def alpaca(record: Record) -> Triple:
    """`instruction`, optional `input`, `output`: OpenPlatypus and CodeAlpaca."""
    extra = (record.get("input") or "").strip()
    prompt = f"{record['instruction']}\n\n{extra}" if extra else record["instruction"]
    return prompt, record["output"], record["output"]


def codefeedback(record: Record) -> Triple:
    """`query` and `answer` of CodeFeedback-Filtered-Instruction."""
    return record["query"], record["answer"], record["answer"]


def _number(value: Any) -> str:
    number = float(value)
    return str(int(number)) if number.is_integer() else str(number)


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
