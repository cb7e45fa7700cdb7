"""A task's questions from the user's own files, in the columns that its prompts read.

A task's data is a file with its test questions, or a folder with a file for each split (`train`,
`dev`, `val`, `test` in its name). The files may be as the dataset's authors publish them or as the hub has them; LLM-
Adapters' collection of short-answer sets is understood too. `datasets` never sees the network.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from lorapar_ray.datasets.records import TooLong, read_records
from lorapar_ray.errors import UserError
from lorapar_ray.files import expanded

Record = Mapping[str, Any]
SPLITS = {"train": "train", "dev": "dev", "val": "validation", "test": "test"}
ENDINGS = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")
LETTERS = "ABCDEFGH"


def local_dataset(family: str, path: str, evaluated: str, name: str | None = None, **_: Any) -> dict[str, Any]:
    """{split: `datasets.Dataset`} of a family of tasks.

    Args:
        family: one of `FAMILIES`.
        path: a file or a folder.
        evaluated: the split with the test questions; a single file is this split.
        name: the part of the dataset: MMLU's subject.

    Raises:
        UserError: there are no such files, or a row lacks a column.
    """
    from datasets import Dataset, DatasetDict

    found = DatasetDict()
    for split, file in split_files(family, path, evaluated).items():
        rows = [row for row in _rows(family, str(file)) if name is None or row.get("subject", name) == name]
        found[split] = Dataset.from_list(rows)
    if not any(len(split) for split in found.values()):
        part = "" if name is None else f" of '{name}'"
        raise UserError(f"evaluate.data.{family}: '{path}' holds no rows{part}")
    return dict(found)


def split_files(family: str, path: str, evaluated: str) -> dict[str, Path]:
    """The file of each split; `dev` is MMLU's examples, and elsewhere a name for `validation`.

    Raises:
        UserError: there are none, or two for one split.
    """
    where, place = f"evaluate.data.{family}", expanded(path, f"evaluate.data.{family}")
    if place.is_file():
        return {evaluated: place}
    if not place.is_dir():
        raise UserError(f"{where}: no such file or folder '{path}'; paths are relative to the working directory")
    found: dict[str, Path] = {}
    for file in sorted(each for each in place.iterdir() if each.name.endswith(ENDINGS)):
        named = re.search(rf"(?<![a-z])({'|'.join(SPLITS)})", file.name.lower())
        split = SPLITS[named.group()] if named else evaluated
        split = "validation" if split == "dev" and family != "mmlu" else split
        if split in found:
            raise UserError(
                f"{where}: '{path}' has two files for its {split} questions, {found[split].name} and {file.name}; "
                "give the path of one of them"
            )
        found[split] = file
    if not found:
        raise UserError(f"{where}: '{path}' holds no {', '.join(ENDINGS)} file")
    if evaluated not in found and "test" in found:
        found[evaluated] = found.pop("test")  # BoolQ's and ARC's test questions may have another name on the hub
    return found


@lru_cache(maxsize=8)  # MMLU's 57 tasks read the same files
def _rows(family: str, file: str) -> list[dict[str, Any]]:
    where = f"evaluate.data.{family}"
    rows = []
    for number, record in enumerate(read_records(file, where), start=1):
        if isinstance(record, TooLong):
            raise UserError(f"{where}: '{file}' row {number} is too long to be a question")
        try:
            rows += FAMILIES[family](record)
        except KeyError as error:
            raise UserError(
                f"{where}: '{file}' row {number} has no column {error}; it has {', '.join(map(str, record))}"
            ) from error
        except (ValueError, TypeError, AttributeError, IndexError) as error:
            raise UserError(f"{where}: '{file}' row {number} cannot be used ({error})") from error
    return rows


def _gsm8k(record: Record) -> list[dict[str, Any]]:
    return [{"question": record["question"], "answer": record["answer"]}]


def _mmlu(record: Record) -> list[dict[str, Any]]:
    answer = record["answer"]
    right = LETTERS.index(answer) if isinstance(answer, str) else int(answer)
    columns = {name: record[name] for name in ("question", "subject", "choices")}
    if not 0 <= right < len(columns["choices"]):
        raise ValueError(f"answer {answer!r} of {len(columns['choices'])} choices")
    return [columns | {"answer": right}]


def _arc(record: Record) -> list[dict[str, Any]]:
    if "instruction" in record:
        question, texts = _listed_choices(record["instruction"])
        labels = [str(place + 1) for place in range(len(texts))]
        right = record["answer"].removeprefix("answer")
    else:
        question, texts, labels = record["question"], record["choices"]["text"], record["choices"]["label"]
        right = record["answerKey"]
    if right not in labels:
        raise ValueError(f"answer {right!r} is not among the labels {', '.join(labels)}")
    return [{"question": question, "choices": {"text": list(texts), "label": list(labels)}, "answerKey": right}]


def _listed_choices(instruction: str) -> tuple[str, list[str]]:
    """(question, choices) of a prompt of LLM-Adapters."""
    asked, _, listed = instruction.partition("\n\nAnswer1: ")
    if not listed:
        raise ValueError("no 'Answer1:' in its instruction")
    choices = re.split(r"\s*Answer\d+: ", listed.partition("\n\nAnswer format")[0])
    return asked.partition(": ")[2].strip(), [choice.strip() for choice in choices]


def _boolq(record: Record) -> list[dict[str, Any]]:
    """Without a passage, as LLM-Adapters has it, only `boolq_closed_book` can be asked."""
    answer = record["answer"] if "answer" in record else record["label"]
    label = int(answer) if isinstance(answer, bool | int) else {"false": 0, "true": 1}[str(answer).lower()]
    if "instruction" in record:
        question, rest = record["instruction"].partition("question: ")[2].partition("\n")[0], {}
    else:
        question, rest = record["question"], {name: record[name] for name in ("passage",) if name in record}
    return [{"question": question.rstrip("? "), "label": label, **rest}]


def _word_problem(record: Record) -> list[dict[str, Any]]:
    """SVAMP, MAWPS and similar sets: {question, answer}, with the answer's shortest form."""
    if "Body" in record:
        body = record["Body"].strip()
        question = f"{body}{'' if body.endswith(('.', '?', '!', ',')) else '.'} {record['Question'].strip()}"
        answer = record["Answer"]
    else:
        question = record[next((name for name in ("original_text", "instruction") if name in record), "question")]
        answer = record[next((name for name in ("ans", "Answer") if name in record), "answer")]
    return [{"question": question.strip(), "answer": _short(answer)}]


def _short(answer: Any) -> str:
    text = str(answer).strip()
    try:
        number = float(text.replace(",", ""))
    except ValueError:
        return text
    return str(int(number)) if number.is_integer() and abs(number) < 2**53 else text


def _humaneval(record: Record) -> list[dict[str, Any]]:
    return [{name: record[name] for name in ("task_id", "prompt", "entry_point", "test")}]


def _mbpp(record: Record) -> list[dict[str, Any]]:
    """The 500 test problems of the full set (11 to 510), or all of another file."""
    if "text" not in record and "prompt" not in record:
        raise KeyError("text")
    if "text" in record and not 11 <= int(record.get("task_id", 11)) <= 510:
        return []
    text = record["text"] if "text" in record else record["prompt"]
    setup = "\n".join([*record.get("test_imports", ()), record.get("test_setup_code") or ""])
    return [{"text": text, "code": record["code"], "test_list": record["test_list"], "test_setup_code": setup}]


FAMILIES: dict[str, Callable[[Record], list[dict[str, Any]]]] = {
    "gsm8k": _gsm8k,
    "mmlu": _mmlu,
    "arc_easy": _arc,
    "arc_challenge": _arc,
    "boolq": _boolq,
    "svamp": _word_problem,
    "mawps": _word_problem,
    "humaneval": _humaneval,
    "mbpp": _mbpp,
}
"""Data sets that may be given as files, with the functions that convert their records to a task's rows."""


def family_of(config: Mapping[str, Any]) -> str | None:
    """The family of data of a task's config, by the place it would load from; None: another."""
    path, name = str(config.get("dataset_path", "")), config.get("dataset_name")
    if path == "allenai/ai2_arc":
        return {"ARC-Easy": "arc_easy", "ARC-Challenge": "arc_challenge"}.get(str(name))
    if path == "aps/super_glue":
        return "boolq" if name == "boolq" else None
    return {
        "openai/gsm8k": "gsm8k",
        "gsm8k": "gsm8k",
        "cais/mmlu": "mmlu",
        "ChilleD/SVAMP": "svamp",
        "mawps": "mawps",
        "openai/openai_humaneval": "humaneval",
        "google-research-datasets/mbpp": "mbpp",
    }.get(path)
