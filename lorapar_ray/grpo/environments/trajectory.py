"""One sample of an environment, as tokens, and the record of a group of samples, which stage 2 trains on."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from math import isfinite
from operator import index
from typing import TYPE_CHECKING, Any

import numpy as np

from lorapar_ray.engines.completion import Kept
from lorapar_ray.engines.record import GroupHead, GroupRecord, KeptSets, kept_sets

if TYPE_CHECKING:
    from numpy.typing import NDArray


class TrajectoryFull(ValueError):
    """The policy cannot continue: the trajectory has reached the config's length limit."""


@dataclass(frozen=True)
class Limits:
    """Limits of a trajectory."""

    prompt: int
    """Most tokens of its prompt."""
    completion: int
    """Most tokens after the prompt, including the environment's."""
    vocabulary: int
    """Number of tokens that the model and its tokenizer both have."""


@dataclass(frozen=True)
class Turn:
    """The policy's answer in one turn."""

    token_ids: list[int]
    finished: bool
    """False if it was cut at a token limit."""
    version: int
    """The policy's version when the turn began."""


class Trajectory:
    """A prompt and the tokens after it; tokens are only appended, so sampled tokens never change."""

    def __init__(self, prompt_ids: Sequence[int], limits: Limits) -> None:
        """Begin with a prompt; see `TurnEngine.begin`.

        Raises:
            ValueError: it is empty or too long, or has tokens outside the vocabulary.
        """
        self.reward: float | None = None
        """The sample's value of the reward `environment`; None: no value."""
        self.turns: list[Turn] = []
        self._limits = limits
        self._prompt = _checked(prompt_ids, limits)
        self._token_ids: list[int] = []
        self._logprobs: list[float] = []
        self._sampled: list[bool] = []
        self._kept = Kept([], [])
        if not 0 < len(self._prompt) <= limits.prompt:
            raise ValueError(
                f"a prompt of {len(self._prompt)} tokens; 1 to {limits.prompt} are allowed (grpo.max_prompt_length)"
            )

    @property
    def ids(self) -> list[int]:
        """Every token so far, the prompt's first."""
        return self._prompt + self._token_ids

    @property
    def prompt_ids(self) -> list[int]:
        """The prompt's tokens."""
        return list(self._prompt)

    @property
    def room(self) -> int:
        """Number of tokens that still fit."""
        return max(0, self._limits.completion - len(self._token_ids))

    def add(self, token_ids: Sequence[int]) -> None:
        """Append the environment's tokens: the policy reads them and is not trained on them.

        Raises:
            ValueError: a token is not in the model's vocabulary.
        """
        found = _checked(token_ids, self._limits)
        self._token_ids += found
        self._logprobs += [0.0] * len(found)
        self._sampled += [False] * len(found)
        self._kept.counts += [0] * len(found)

    def take(
        self, token_ids: Sequence[int], logprobs: Sequence[float], turn: Turn, kept: KeptSets | None = None
    ) -> None:
        """Append what an engine sampled after `ids`; for `TurnEngine`.

        Args:
            kept: the kept sets that it was sampled from; None: the whole vocabulary.
        """
        if kept is None:
            self._kept.counts += [0] * len(token_ids)
        else:
            self._kept.extend(Kept(kept.token_ids.tolist(), kept.counts.tolist()))
        self._token_ids += [int(each) for each in token_ids]
        self._logprobs += [float(each) for each in logprobs]
        self._sampled += [True] * len(token_ids)
        self.turns.append(turn)

    def require_complete(self) -> None:
        """Check that it can be trained on.

        Raises:
            ValueError: the policy sampled nothing, or the reward is not a number.
        """
        if not any(self._sampled):
            raise ValueError("the policy sampled nothing; call engine.generate")
        if self.reward is not None and not _is_number(self.reward):
            raise ValueError(f"its reward is {str(self.reward)[:60]}; give one finite number, or None")

    def kept(self, prompt: int) -> Kept:
        """The kept sets of the tokens of `arrays`."""
        counts = [*([0] * (len(self._prompt) - prompt)), *self._kept.counts[: self._end]]
        return Kept(self._kept.token_ids, counts)

    @property
    def _end(self) -> int:
        """Index after the last sampled token."""
        return len(self._sampled) - len(list(takewhile(lambda sampled: not sampled, reversed(self._sampled))))

    def arrays(self, prompt: int) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.bool_]]:
        """Tokens after the first `prompt` ones up to the last sampled one, their log-probabilities, and which were
        sampled; [N] each."""
        more = self._prompt[prompt:]
        end = self._end
        return (
            np.array([*more, *self._token_ids[:end]], np.int32),
            np.array([*([0.0] * len(more)), *self._logprobs[:end]], np.float32),
            np.array([*([False] * len(more)), *self._sampled[:end]], np.bool_),
        )


def as_record(trajectories: Sequence[Trajectory], lost: Sequence[str]) -> GroupRecord:
    """A group's trajectories as one record.

    Its prompt is the common beginning of their prompts; if an environment begins each differently, the rest counts as
    the environment's tokens.

    Args:
        lost: reasons of the group's missing samples.
    """
    prompts = [each.prompt_ids for each in trajectories]
    same = takewhile(lambda column: len(set(column)) == 1, zip(*prompts, strict=False))
    prompt = [column[0] for column in same]
    parts = [each.arrays(len(prompt)) for each in trajectories]
    kept = [each.kept(len(prompt)) for each in trajectories]
    ids, logprobs, sampled = zip(*parts, strict=True) if parts else ((), (), ())
    head = GroupHead(
        prompt_tokens=len(prompt),
        lengths=tuple(map(len, ids)),
        finished=tuple(
            each.turns[-1].finished or each.room > 0 for each in trajectories
        ),  # a turn may be cut on purpose
        versions=tuple(each.turns[0].version for each in trajectories),
        sampled=tuple(int(each.sum()) for each in sampled),
        turns=tuple(len(each.turns) for each in trajectories),
        rewards=tuple(None if each.reward is None else float(each.reward) for each in trajectories),
        lost=tuple(lost),
        after_prompts=tuple(len(tokens) - (len(own) - len(prompt)) for tokens, own in zip(ids, prompts, strict=True)),
    )
    return GroupRecord(
        np.array(prompt, np.int32),
        np.concatenate([np.zeros(0, np.int32), *ids]),
        np.concatenate([np.zeros(0, np.float32), *logprobs]),
        head,
        np.concatenate([np.zeros(0, np.bool_), *sampled]),
        kept_sets(kept) if any(each.token_ids for each in kept) else None,
    )


def _checked(token_ids: Sequence[int], limits: Limits) -> list[int]:
    return [_token(each, limits.vocabulary) for each in token_ids]


def _token(given: Any, vocabulary: int) -> int:
    """A token of any library's integer type; nothing is rounded to one."""
    with suppress(TypeError):
        token = -1 if isinstance(given, bool) else index(given)
        if 0 <= token < vocabulary:
            return token
    raise ValueError(f"{str(given)[:40]!r} is not one of the model's {vocabulary} tokens")


def _is_number(reward: Any) -> bool:
    """Whether it is one finite number, not a list of one."""
    try:
        return np.ndim(reward) == 0 and isfinite(float(reward))
    except (TypeError, ValueError):
        return False
