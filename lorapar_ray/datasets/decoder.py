"""Sampled token ids as text, in a Ray actor: the tokenizer is loaded on a machine that has the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lorapar_ray.config import ModelConfig, Resources
from lorapar_ray.datasets.chat import load_encoder_alone
from lorapar_ray.errors import UserError
from lorapar_ray.models import model_reference, resolve_model
from lorapar_ray.workers import beside_the_driver, worker_environment


class Decoder:
    """Ray actor around one `Encoder`."""

    def __init__(self, model: str, trust_remote_code: bool) -> None:
        self._model, self._trust = model, trust_remote_code
        self._encoder: Any = None

    def start(self) -> list[int] | str:
        """Load the tokenizer; returns the tokens at which sampling stops, or the message of a user's error."""
        try:
            self._encoder = load_encoder_alone(resolve_model(self._model), None, self._trust)
            ends: list[int] = self._encoder.end_ids
        except UserError as error:
            return str(error)
        return ends

    def texts(self, answers: Sequence[Sequence[int]], stop: Sequence[str]) -> list[str]:
        """`Encoder.answer_text` of each answer."""
        return [self._encoder.answer_text(ids, stop) for ids in answers]


class Decoding:
    """The driver's side of a `Decoder`."""

    def __init__(self, actor: Any, end_ids: list[int]) -> None:
        self._actor = actor
        self.end_ids = end_ids
        """Every token at which sampling stops."""

    def texts(self, answers: Sequence[Sequence[int]], stop: Sequence[str]) -> list[str]:
        """Text of each answer up to the first end token and the first stop string."""
        import ray

        found: list[str] = ray.get(self._actor.texts.remote(answers, stop))
        return found


@contextmanager
def decoding(model: ModelConfig) -> Iterator[Decoding]:
    """A decoder with the tokenizer of `model`, while the block lasts.

    Raises:
        UserError: the tokenizer cannot be loaded.
    """
    import ray

    environment = {"env_vars": worker_environment(Resources(cpus=0, gpus=0))}
    kind = ray.remote(Decoder).options(**beside_the_driver(), runtime_env=environment)
    actor = kind.remote(model_reference(model.path), model.trust_remote_code)
    try:
        ends = ray.get(actor.start.remote())
        if isinstance(ends, str):
            raise UserError(ends)
        yield Decoding(actor, ends)
    finally:
        ray.kill(actor)
