"""A finished group as a message: a record of arrays, and a head with their sizes for processes that need no tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lorapar_ray.engines.completion import Completion, Kept

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class GroupHead:
    """Facts about a group's completions, without their tokens."""

    prompt_tokens: int
    lengths: tuple[int, ...]
    """Tokens of each completion; of an environment's sample also what is its own of the prompt, see `answers`."""
    finished: tuple[bool, ...]
    """False where a completion was cut at the length limit."""
    versions: tuple[int, ...]
    """See `Completion.version`."""
    open: tuple[int, ...] = ()
    """Unfinished completions: the group was given back, or its engine is still sampling it."""
    sampled: tuple[int, ...] = ()
    """Tokens of each completion that the policy sampled; empty: all of them. The others are an environment's."""
    turns: tuple[int, ...] = ()
    """Turns of each completion in its environment."""
    rewards: tuple[float | None, ...] = ()
    """The environment's reward of each completion."""
    lost: tuple[str, ...] = ()
    """Reasons of the group's missing samples, one text each."""
    after_prompts: tuple[int, ...] = ()
    """Tokens of each completion after its own prompt, where an environment gives samples different prompts; empty: as
    `lengths`."""

    @property
    def answers(self) -> tuple[int, ...]:
        """Tokens of each completion after its own prompt; what limits on completions apply to."""
        return self.after_prompts or self.lengths

    @property
    def trained(self) -> tuple[int, ...]:
        """Tokens of each completion that count in the loss."""
        return self.sampled or self.lengths


@dataclass(frozen=True)
class KeptSets:
    """The tokens that top-k, top-p and min-p kept, for N sampled tokens, concatenated.

    A learner must normalise over the same tokens. Over the whole vocabulary a ratio at equal policies would be the
    probability of the kept set, not 1: each token's gradient would be smaller by that factor, most for the least
    certain tokens.
    """

    token_ids: NDArray[np.int32]
    """[sum of counts]"""
    counts: NDArray[np.int32]
    """[N]; 0 at an environment's tokens."""

    def split(self, lengths: Sequence[int]) -> list[KeptSets]:
        """Consecutive parts of `lengths` tokens each, as views."""
        counts = _split(self.counts, lengths)
        ids = _split(self.token_ids, [int(part.sum()) for part in counts])
        return [KeptSets(*part) for part in zip(ids, counts, strict=True)]


@dataclass(frozen=True)
class GroupRecord:
    """One prompt and its G completions, concatenated, of N tokens in total.

    Read from Ray's object store the arrays are views of shared memory: nothing is copied, and they cannot be written.
    """

    prompt_ids: NDArray[np.int32]
    """[P]"""
    token_ids: NDArray[np.int32]
    """[N]"""
    logprobs: NDArray[np.float32]
    """[N]: log-probability of each token, under the policy and temperature that sampled it; 0 where `sampled` is not
    set."""
    head: GroupHead
    sampled: NDArray[np.bool_] | None = None
    """[N]: not set at an environment's tokens; None: the policy sampled all."""
    kept: KeptSets | None = None
    """The kept set of each token; None: the whole vocabulary."""

    def completions(self) -> list[tuple[NDArray[np.int32], NDArray[np.float32]]]:
        """(token ids, log-probabilities) of each completion, as views."""
        lengths = self.head.lengths
        return list(zip(_split(self.token_ids, lengths), _split(self.logprobs, lengths), strict=True))

    def masks(self) -> list[NDArray[np.bool_] | None]:
        """Which tokens of each completion the policy sampled, as views; None: all."""
        return [None] * len(self.head.lengths) if self.sampled is None else [*_split(self.sampled, self.head.lengths)]

    def kept_sets(self) -> list[KeptSets | None]:
        """The kept sets of each completion's tokens, as views; None: the whole vocabulary."""
        return [None] * len(self.head.lengths) if self.kept is None else [*self.kept.split(self.head.lengths)]


def _split(values: NDArray[Any], lengths: Sequence[int]) -> list[NDArray[Any]]:
    """Consecutive parts of such lengths, as views."""
    return np.split(values, np.cumsum(lengths)[:-1]) if lengths else []


def record_of(
    prompt_ids: Sequence[int] | NDArray[Any], completions: Sequence[Completion], unfinished: Sequence[int] = ()
) -> GroupRecord:
    """The record of a prompt's completions, some of which may be unfinished (`GroupHead.open`)."""
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
        kept=kept_sets([done.kept for done in completions]),
    )


def kept_sets(completions: Sequence[Kept]) -> KeptSets | None:
    """As arrays; None where nothing was cut."""
    if not any(kept.counts for kept in completions):
        return None
    ids, counts = [kept.token_ids for kept in completions], [kept.counts for kept in completions]
    return KeptSets(np.concatenate(ids).astype(np.int32), np.concatenate(counts).astype(np.int32))


def read_record(reference: Any) -> GroupRecord | None:
    """A record from the object store; None if it is lost with the node that held it."""
    import ray

    try:
        record: GroupRecord = ray.get(reference)
    except ray.exceptions.ObjectLostError:
        return None
    return record
