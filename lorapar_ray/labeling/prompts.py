"""What a teacher is asked: to play the student and say which System a question belongs to (paper, section 3.1).

Everything that is the same for all questions comes first, so that the engine's prefix cache holds it once; the question
comes last and the text ends in `System:`, so that the answer is one token and nothing is left to parse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lorapar_ray.config import VoteExample

CONTENT_FREE = ("N/A", "[question]", "…")
"""Questions that say nothing: how a teacher labels them is its bias (contextual calibration, arXiv 2102.09690)."""


def voting_prompt(
    question: str,
    answer: str,
    *,
    definitions: Mapping[int, str],
    examples: Sequence[VoteExample],
    student: str | None,
) -> str:
    """The text up to and including `System:`.

    Args:
        definitions: what each System means, in the order they are to be read.
        examples: worked examples, in the order they are to be read.
        student: the model the teacher plays; None leaves the role out (strategy `single`).
    """
    role = f"Act as the language model {student}. " if student else ""
    kinds = "\n".join(f"System {system}: {meaning}." for system, meaning in definitions.items())
    blocks = [
        f"{role}Decide which System a question belongs to.\n{kinds}",
        *(_block(example.question, example.answer) + f" {example.system}" for example in examples),
        _block(question, answer),
    ]
    return "\n\n".join(blocks)


def with_template(prompt: str, tokenizer: Any, use: bool | None) -> str:
    """The prompt inside the tokenizer's chat template (if it has one, or as `use` says), `System:` left open."""
    if not (tokenizer.chat_template is not None if use is None else use):
        return prompt
    asked, ending = prompt.removesuffix("System:").rstrip(), "System:"
    message = [{"role": "user", "content": asked}]
    opened: str = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    return opened + ending


def _block(question: str, answer: str) -> str:
    return f"Question: {question}\nAnswer: {answer}\nSystem:"
