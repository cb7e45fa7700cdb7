"""The voting prompt: the teacher plays the student and chooses a question's System (paper, section 3.1).

The part that is equal for all questions comes first, for the engine's prefix cache; the question comes last and the
text ends in `System:`, so that the answer is one token and needs no parsing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lorapar_ray.config import LabelConfig, TeacherConfig, VoteExample

CONTENT_FREE = ("N/A", "[question]", "…")
"""Questions without content: a teacher's answer to them is its bias (contextual calibration, arXiv 2102.09690)."""


def voting_prompt(
    question: str, answer: str, *, label: LabelConfig, teacher: TeacherConfig, student: str, rotation: int = 0
) -> str:
    """The text up to and including `System:` (or `label.prompt.choice`); see `prompt_opening`."""
    return prompt_opening(label, teacher, student, rotation) + question_block(label, question, answer)


def prompt_opening(label: LabelConfig, teacher: TeacherConfig, student: str, rotation: int = 0) -> str:
    """The part that is equal for all questions: role, task, definitions, examples.

    Args:
        student: the model the teacher plays; strategy `single` omits the role.
        rotation: shift of the Systems' numbers: with 0, System 1 has number 1; with 1 it has number 2, and the last
            System number 1. Definitions are listed in the order of their numbers, so both number and position change.
    """
    text = label.prompt
    number = dict(zip(sorted(label.definitions), numbers(label, rotation), strict=True))
    role = text.role.format(student=student) if label.strategy != "single" else ""
    kinds = "\n".join(
        text.definition.format(system=number[system], meaning=label.definitions[system])
        for system in sorted(number, key=number.__getitem__)
    )
    examples: Sequence[VoteExample] = sorted(label.examples, key=lambda example: number[example.system])
    if teacher.example_order == "system2_first":
        examples = examples[::-1]
    blocks = [
        f"{role}{text.task.format()}\n{kinds}",
        *(
            f"{question_block(label, example.question, example.answer)} {number[example.system]}"
            for example in examples
        ),
    ]
    return "".join(f"{block}\n\n" for block in blocks)


def question_block(label: LabelConfig, question: str, answer: str) -> str:
    """The part after the opening."""
    return f"{label.prompt.question.format(question=question, answer=answer)}\n{label.prompt.choice}"


def numbers(label: LabelConfig, rotation: int) -> list[int]:
    """The number of each System (in order) in a rotated prompt."""
    count = len(label.definitions)
    return [(index + rotation) % count + 1 for index in range(count)]


def rotations(label: LabelConfig) -> range:
    """The prompts a teacher is asked for one question: K for `swapped_definitions`, else the plain one."""
    return range(len(label.definitions) if label.calibration == "swapped_definitions" else 1)


def with_template(prompt: str, tokenizer: Any, use: bool | None, choice: str) -> str:
    """The prompt inside the tokenizer's chat template (if it has one, or as `use` says), its last words left open."""
    if not (tokenizer.chat_template is not None if use is None else use):
        return prompt
    asked = prompt.removesuffix(choice).rstrip()
    message = [{"role": "user", "content": asked}]
    opened: str = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    return opened + choice


def with_thought(opened: str, thought: str, choice: str) -> str:
    """The prompt, the model's thought, and the words that ask for the choice; an open <think> is closed."""
    unfinished = "<think>" in opened + thought and "</think>" not in thought
    return f"{opened}{thought}{'</think>' if unfinished else ''}\n{choice}"
