"""The engine's interface for an environment: it continues a trajectory, encodes text and decodes tokens."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from lorapar_ray.datasets.chat import Encoder
from lorapar_ray.engines.record import GroupRecord
from lorapar_ray.grpo.environments.trajectory import Limits, Trajectory, TrajectoryFull, Turn

Sample = Callable[[list[int], dict[str, Any]], Awaitable[GroupRecord]]
"""Continues tokens on an engine, with vLLM's sampling parameters."""


class TurnEngine:
    """The engine that an episode gets. The config sets how it samples (temperature, …), since ratios depend on it."""

    def __init__(self, sample: Sample, encoder: Encoder, limits: Limits) -> None:
        self._sample, self._encoder, self._limits = sample, encoder, limits
        self._begun: list[Trajectory] = []

    @property
    def tokenizer(self) -> Any:
        """The model's transformers tokenizer."""
        return self._encoder.tokenizer

    def begin(self, prompt_ids: Sequence[int]) -> Trajectory:
        """A new trajectory.

        Raises:
            ValueError: the prompt is longer than `grpo.max_prompt_length`, or has tokens outside the vocabulary.
        """
        trajectory = Trajectory(prompt_ids, self._limits)
        self._begun.append(trajectory)
        return trajectory

    async def generate(
        self, trajectory: Trajectory, *, max_tokens: int | None = None, stop: Sequence[str] = ()
    ) -> Turn:
        """Let the policy continue up to an end token, one of `stop` (tokens with its text are kept), or a limit.

        Args:
            max_tokens: of this turn; at most `trajectory.room`.

        Raises:
            TrajectoryFull: no room is left.
        """
        if not trajectory.room:
            raise TrajectoryFull(
                f"it has all {self._limits.completion} tokens of grpo.max_completion_length, the environment's "
                "included; raise that, or end the episode when trajectory.room is 0"
            )
        room = trajectory.room if max_tokens is None else max(1, min(max_tokens, trajectory.room))
        record = await self._sample(trajectory.ids, {"max_tokens": room, "stop": list(stop)})
        [(token_ids, logprobs)] = record.completions()
        turn = Turn(token_ids.tolist(), record.head.finished[0], record.head.versions[0])
        trajectory.take(token_ids.tolist(), logprobs.tolist(), turn, record.kept_sets()[0])
        return turn

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, without those of a chat template."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """The tokens' text, up to the first end token."""
        return self._encoder.answer_text(token_ids)

    def reply(self, trajectory: Trajectory, message: str | Sequence[Mapping[str, Any]], **template: Any) -> list[int]:
        """Tokens that continue a chat after the policy's last turn: its end token, if missing, then messages, up to the
        policy's next answer.

        Args:
            message: a user's words, or messages `{role, content}`.
            template: further arguments of the chat template, such as `tools`.

        Raises:
            UserError: the chat template refuses the messages.
        """
        messages = [{"role": "user", "content": message}] if isinstance(message, str) else [dict(m) for m in message]
        ids = self._encoder.continuation_ids(messages, **template)
        ended = trajectory.ids[-1] in self._encoder.end_ids
        return ids[1:] if ended and ids and ids[0] in self._encoder.end_ids else ids

    def complete(self, trajectory: Any) -> Trajectory:
        """Check the trajectory that an episode returned; for `EpisodeGroup`.

        Raises:
            TypeError: it was not begun here.
            ValueError: see `Trajectory.require_complete`.
        """
        if not any(trajectory is each for each in self._begun):
            raise TypeError(f"it returns {type(trajectory).__name__}, not the trajectory that engine.begin gave it")
        found: Trajectory = trajectory
        found.require_complete()
        return found
