"""Verifiable rewards with TRL's signature: `fn(prompts, completions, **columns) -> list[float]`, 1.0 meaning right."""

from __future__ import annotations

import re
from typing import Any

from lorapar_ray.datasets.answers import as_float, extract_answer, extract_number

Completions = list[Any]
_STRICT = re.compile(r"^<reasoning>\n.*?\n</reasoning>\n<answer>\n.*?\n</answer>\n?$", re.DOTALL)
_SOFT = re.compile(r"<reasoning>.*?</reasoning>\s*<answer>.*?</answer>", re.DOTALL)


def text_of(completion: Any) -> str:
    """A completion as text; conversational ones are lists of messages."""
    return completion if isinstance(completion, str) else "".join(message["content"] for message in completion)


def numeric_answer(prompts: list[str], completions: Completions, answer: list[str], **_: Any) -> list[float]:
    """1 if the completion's final number equals the answer's, or math-verify finds the two expressions equal."""
    return [float(_same_number(text_of(done), want)) for done, want in zip(completions, answer, strict=True)]


def exact_answer(prompts: list[str], completions: Completions, answer: list[str], **_: Any) -> list[float]:
    """1 if the final answers agree up to case, surrounding space and a closing full stop."""
    return [float(_normal(text_of(done)) == _normal(want)) for done, want in zip(completions, answer, strict=True)]


def option_letter(prompts: list[str], completions: Completions, answer: list[str], **_: Any) -> list[float]:
    """1 if the first option letter that stands alone is the answer's."""

    def first_letter(text: str) -> str | None:
        found = re.search(r"(?<![A-Za-z])([A-H])(?![A-Za-z])", extract_answer(text))
        return found.group(1) if found else None

    return [float(first_letter(text_of(done)) == want.strip()) for done, want in zip(completions, answer, strict=True)]


def integer_answer(prompts: list[str], completions: Completions, **_: Any) -> list[float]:
    """0.5 if the answer tag holds an integer (the authors' reward)."""
    return [0.5 * bool(re.fullmatch(r"-?\d+", extract_answer(text_of(done)))) for done in completions]


def strict_format(prompts: list[str], completions: Completions, **_: Any) -> list[float]:
    """0.5 for `<reasoning>` and `<answer>` blocks on lines of their own and nothing else (the authors' reward)."""
    return [0.5 * bool(_STRICT.match(text_of(done))) for done in completions]


def soft_format(prompts: list[str], completions: Completions, **_: Any) -> list[float]:
    """0.5 for a `<reasoning>` block followed by an `<answer>` block (the authors' reward)."""
    return [0.5 * bool(_SOFT.search(text_of(done))) for done in completions]


def tag_count(prompts: list[str], completions: Completions, **_: Any) -> list[float]:
    """0.125 for each of the four tags that occurs exactly once (the authors' reward, at most 0.5)."""
    tags = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")
    return [sum(0.125 for tag in tags if text_of(done).count(tag) == 1) for done in completions]


def reference_overlap(prompts: list[str], completions: Completions, response: list[str], **_: Any) -> list[float]:
    """ROUGE-L F1 (longest common subsequence of words) with the reference response."""
    return [_rouge_l(text_of(done).split(), want.split()) for done, want in zip(completions, response, strict=True)]


def _same_number(text: str, want: str) -> bool:
    found, expected = extract_number(text), extract_number(want)
    if found is None or expected is None:
        return False
    ours, theirs = as_float(found), as_float(expected)
    if ours is not None and theirs is not None and abs(ours - theirs) <= 1e-6 * max(1.0, abs(theirs)):
        return True
    if re.fullmatch(r"[-+\d.,/$%\s]*", extract_answer(want)):
        return False  # a plain number was wanted and another one was found: nothing left to parse
    from math_verify import parse, verify

    # its time limits are signals, which only a main thread may set; the reward process has a limit of its own
    gold, guess = parse(want, parsing_timeout=None), parse(extract_answer(text), parsing_timeout=None)
    return bool(verify(gold, guess, timeout_seconds=None))


def _normal(text: str) -> str:
    return " ".join(extract_answer(text).split()).rstrip(".").casefold()


def _rouge_l(ours: list[str], theirs: list[str]) -> float:
    row = [0] * (len(theirs) + 1)
    for word in ours:
        diagonal = 0
        for column, other in enumerate(theirs, start=1):
            above = row[column]
            row[column] = diagonal + 1 if word == other else max(above, row[column - 1])
            diagonal = above
    common = row[-1]
    return 0.0 if common == 0 else 2 * common / (len(ours) + len(theirs))
