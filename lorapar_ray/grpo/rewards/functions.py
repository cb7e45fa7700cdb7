"""Verifiable rewards with TRL's signature: `fn(prompts, completions, **columns) -> list[float]`, 1.0 meaning right."""

from __future__ import annotations

import re
from typing import Any

from lorapar_ray.datasets.answers import final_answer, option_letter_in, same_number, same_text
from lorapar_ray.grpo.rewards.expressions import equal_expressions

Completions = list[Any]
# each part is found once (`(?>…)`): with many of them a text would be read over and over
_STRICT = re.compile(r"<reasoning>\n(?>.*?\n</reasoning>\n<answer>\n).*\n</answer>\n?$", re.DOTALL)
_SOFT = re.compile(r"(?>.*?<reasoning>)(?>.*?</reasoning>\s*+<answer>).*?</answer>", re.DOTALL)


def text_of(completion: Any) -> str:
    """A completion as text; conversational ones are lists of messages."""
    return completion if isinstance(completion, str) else "".join(message["content"] for message in completion)


def numeric_answer(prompts: list[str], completions: Completions, answer: list[str], **_: Any) -> list[float]:
    """1 if the completion's final answer has the reference's value (see `same_number`)."""
    pairs = zip(completions, answer, strict=True)
    return [float(same_number(text_of(done), want, equal_expressions)) for done, want in pairs]


def exact_answer(prompts: list[str], completions: Completions, answer: list[str], **_: Any) -> list[float]:
    """1 if the final answer is the reference's text (see `same_text`)."""
    return [float(same_text(text_of(done), want)) for done, want in zip(completions, answer, strict=True)]


def option_letter(prompts: list[str], completions: Completions, answer: list[str], **_: Any) -> list[float]:
    """1 if the completion chooses the reference's option letter (see `option_letter_in`)."""
    pairs = zip(completions, answer, strict=True)
    return [float(option_letter_in(text_of(done)) == want.strip(" ().").upper()) for done, want in pairs]


def integer_answer(prompts: list[str], completions: Completions, **_: Any) -> list[float]:
    """0.5 if the answer tag holds an integer (the authors' reward)."""
    return [0.5 * bool(re.fullmatch(r"-?\d+", final_answer(text_of(done)))) for done in completions]


def strict_format(prompts: list[str], completions: Completions, **_: Any) -> list[float]:
    """0.5 for `<reasoning>` and `<answer>` blocks on lines of their own and nothing else (the authors' reward)."""
    return [0.5 * bool(_STRICT.match(text_of(done))) for done in completions]


def soft_format(prompts: list[str], completions: Completions, **_: Any) -> list[float]:
    """0.5 for a `<reasoning>` block followed by an `<answer>` block (the authors' reward)."""
    return [0.5 * bool(_SOFT.match(text_of(done))) for done in completions]


def tag_count(prompts: list[str], completions: Completions, **_: Any) -> list[float]:
    """0.125 for each of the four tags that occurs exactly once (the authors' reward, at most 0.5)."""
    tags = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")
    return [sum(0.125 for tag in tags if text_of(done).count(tag) == 1) for done in completions]


def reference_overlap(prompts: list[str], completions: Completions, response: list[str], **_: Any) -> list[float]:
    """ROUGE-L F1 (longest common subsequence of words) with the reference response."""
    return [_rouge_l(text_of(done).split(), want.split()) for done, want in zip(completions, response, strict=True)]


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
