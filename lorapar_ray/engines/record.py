"""A finished group as it travels: arrays for whoever reads tokens, and a head with their sizes for whoever does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lorapar_ray.engines.completion import Completion

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class GroupHead:
    """What can be said of a group's completions without their tokens."""

    prompt_tokens: int
    lengths: tuple[int, ...]
    """Tokens of each completion."""
    finished: tuple[bool, ...]
    """False where a completion was cut at the length limit."""
    versions: tuple[int, ...]
    """See `Completion.version`."""
    open: tuple[int, ...] = ()
    """Completions that are to go on: the group was given back, or its engine is still at it."""
    sampled: tuple[int, ...] = ()
    """Tokens of each completion that the policy sampled; empty: all of them. The others are an environment's."""
    turns: tuple[int, ...] = ()
    """Turns of each completion in its environment."""
    rewards: tuple[float | None, ...] = ()
    """What the environment itself gives each completion."""
    lost: tuple[str, ...] = ()
    """Why samples of the group are missing, one text each."""

    @property
    def trained(self) -> tuple[int, ...]:
        """Tokens of each completion that count in the loss."""
        return self.sampled or self.lengths


@dataclass(frozen=True)
class GroupRecord:
    """One prompt and its G completions of N tokens together, end to end.

    Read from Ray's object store the arrays are views of shared memory: nothing is copied, and they cannot be written.
    """

    prompt_ids: NDArray[np.int32]
    """[P]"""
    token_ids: NDArray[np.int32]
    """[N]"""
    logprobs: NDArray[np.float32]
    """[N]: of each token, under the policy and temperature that sampled it; 0 where `sampled` is not set."""
    head: GroupHead
    sampled: NDArray[np.bool_] | None = None
    """[N]: not set at tokens that an environment put in; None: the policy sampled all."""

    def completions(self) -> list[tuple[NDArray[np.int32], NDArray[np.float32]]]:
        """(token ids, log-probabilities) of each completion, as views."""
        ends = np.cumsum(self.head.lengths)[:-1]
        return list(zip(np.split(self.token_ids, ends), np.split(self.logprobs, ends), strict=True))

    def masks(self) -> list[NDArray[np.bool_] | None]:
        """Which tokens of each completion the policy sampled, as views; None: all."""
        if self.sampled is None:
            return [None] * len(self.head.lengths)
        return list(np.split(self.sampled, np.cumsum(self.head.lengths)[:-1]))


def record_of(
    prompt_ids: Sequence[int] | NDArray[Any], completions: Sequence[Completion], unfinished: Sequence[int] = ()
) -> GroupRecord:
    """The record of a prompt's completions, of which some may still go on (`GroupHead.open`)."""
    return GroupRecord(
        prompt_ids=np.asarray(prompt_ids, dtype=np.int32),
        token_ids=np.concatenate([np.asarray(done.token_ids, dtype=np.int32) for done in completions]),
        logprobs=np.concatenate([np.asarray(done.logprobs, dtype=np.float32) for done in completions]),
        head=GroupHead(
            prompt_tokens=len(prompt_ids),
            lengths=tuple(len(done.token_ids) for done in completions),
            finished=tuple(done.finished for done in completions),
            versions=tuple(done.version for done in completions),
            open=tuple(unfinished),
        ),
    )


def read_record(reference: Any) -> GroupRecord | None:
    """A record from the object store; None if it is lost with the node that held it."""
    import ray

    try:
        record: GroupRecord = ray.get(reference)
    except ray.exceptions.ObjectLostError:
        return None
    return record
