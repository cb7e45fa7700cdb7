"""Extracts the final answer of a text and compares two answers: one definition for the whole project."""

from lorapar_ray.datasets.answers.compare import same_number, same_text
from lorapar_ray.datasets.answers.letters import option_letter_in
from lorapar_ray.datasets.answers.marks import final_answer
from lorapar_ray.datasets.answers.reading import Answer, read_answer

__all__ = ["Answer", "final_answer", "option_letter_in", "read_answer", "same_number", "same_text"]
