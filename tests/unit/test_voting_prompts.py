"""A teacher's prompt, and how its choice is read."""

from typing import Any

import pytest
from pydantic import ValidationError

from lorapar_ray.labeling.prompts import voting_prompt, with_template, with_thought
from lorapar_ray.labeling.remote import choice_log_probs
from tests.unit.votes import panel


def test_the_question_comes_last_behind_a_shared_prefix() -> None:
    label = panel("a")
    one, other = (
        voting_prompt(question, "7", label=label, teacher=label.teachers[0], student="tiny")
        for question in ("How many {x}?", "Why?")
    )
    assert one.startswith("Act as the language model tiny. Decide which System a question belongs to.\nSystem 1: the")
    assert one.endswith("Question: How many {x}?\nAnswer: 7\nSystem:")
    assert one.split("How many")[0] == other.split("Why?")[0]
    alone = panel("a", strategy="single")
    assert voting_prompt("q", "a", label=alone, teacher=alone.teachers[0], student="tiny").startswith("Decide")


def test_a_rotated_prompt_moves_numbers_places_and_examples_together() -> None:
    label = panel("a", calibration="swapped_definitions")
    plain, swapped = (
        voting_prompt("q", "a", label=label, teacher=label.teachers[0], student="s", rotation=r) for r in (0, 1)
    )
    assert "System 1: the student answers at once" in plain and "Answer: Paris\nSystem: 1" in plain
    assert "System 2: the student answers at once" in swapped and "Answer: Paris\nSystem: 2" in swapped
    assert swapped.index("System 1: the student has to reason") < swapped.index("System 2: the student answers")
    assert swapped.index("12 pens") < swapped.index("Paris")


def test_the_prompt_is_the_users_to_replace() -> None:
    own = {
        "role": "You are {student}.\n",
        "definition": "({system}) {meaning}",
        "question": "F: {question}\nA: {answer}",
    }
    label = panel("a", prompt={**own, "task": "Welche Art?", "choice": "Art:"}, definitions={1: "kurz", 2: "lang"})
    text = voting_prompt("wie?", "so", label=label, teacher=label.teachers[0], student="tiny")
    assert text.startswith("You are tiny.\nWelche Art?\n(1) kurz\n(2) lang\n\nF: What is the capital")
    assert text.endswith("F: wie?\nA: so\nArt:")
    with_chat = with_template(text, _Chat(), None, "Art:")
    assert with_chat.startswith("<user>You are tiny.") and with_chat.endswith("A: so<assistant>Art:")
    for bad in ({"question": "only {question}"}, {"task": "{who}"}, {"definition": "{"}, {"choice": "Art: "}):
        with pytest.raises(ValidationError, match=next(iter(bad))):
            panel("a", prompt=bad)


def test_a_thought_is_closed_before_the_choice_is_asked_for() -> None:
    assert with_thought("q<think>\n", "hm", "System:") == "q<think>\nhm</think>\nSystem:"
    assert with_thought("q<think>\n", "hm</think> two", "System:") == "q<think>\nhm</think> two\nSystem:"
    assert with_thought("q\n", "plain", "System:") == "q\nplain\nSystem:"


class _Chat:
    chat_template = "…"

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        return f"<user>{messages[0]['content']}<assistant>"


def test_choices_are_found_among_an_endpoints_alternatives() -> None:
    assert choice_log_probs([(" 1", -0.5), ("1", -2.0), ("the", -3.0)], ["1", "2"]) == [-0.5, -4.0]
    for bad in ([("the", -0.1)], []):
        with pytest.raises(ValueError, match="no choice"):
            choice_log_probs(bad, ["1", "2"])
