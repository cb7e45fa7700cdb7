"""An engine's groups in flight with their tokens so far, so that another engine can continue them."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any

from lorapar_ray.engines.completion import Completion, Kept
from lorapar_ray.engines.record import GroupRecord, record_of

INTERVAL = 64
"""Number of new tokens per output of a sequence: single-token outputs would take longer than sampling."""


@dataclass
class Growing:
    """One unfinished completion."""

    version: int
    """Version of the policy at its start."""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    kept: Kept = field(default_factory=lambda: Kept([], []))
    ended: bool = False
    finished: bool = False
    """Whether it ended by itself, not at the length limit."""
    request: str = ""
    """The engine's request id."""

    def take(self, choice: Any) -> None:
        """Add an output of vLLM; an aborted request leaves the completion open."""
        self.token_ids += choice.token_ids
        self.logprobs += [choice.logprobs.logprobs[at] for at in choice.logprobs.start_indices]
        self.kept.extend(kept_of(choice.logprobs))
        self.ended = choice.finish_reason in ("stop", "length")
        self.finished = choice.finish_reason == "stop"


@dataclass
class InFlight:
    """A group that an engine samples, or will sample once its policy is loaded."""

    prompt_ids: list[int]
    completions: list[Growing]
    given_back: bool = False
    """No further token is wanted from this engine."""

    def begin(self, version: int) -> None:
        """Completions without a token begin with the policy of this version."""
        for each in self.completions:
            if not each.token_ids:
                each.version = version

    def give_back(self) -> list[str]:
        """Stop; returns the engine's requests to abort."""
        self.given_back = True
        return [each.request for each in self.completions if each.request and not each.ended]

    @property
    def record(self) -> GroupRecord:
        """The tokens so far."""
        return as_record(self.prompt_ids, self.completions)


def kept_of(logprobs: Any) -> Kept:
    """What tokens were sampled from, of vLLM's `FlatLogprobs`; empty if the request asked for none but the sampled one.

    After top-k, top-p and min-p, vLLM sets the log-probability of cut tokens to −inf (`processed_logprobs`, normalised
    over the rest). The `logprobs` likeliest tokens that it reports include all kept ones.
    """
    kept = Kept([], [])
    if len(logprobs.token_ids) > len(logprobs.start_indices):
        for start, end in zip(logprobs.start_indices, logprobs.end_indices, strict=True):
            found = zip(logprobs.token_ids[start:end], logprobs.logprobs[start:end], strict=True)
            kept.add(sorted({token for token, value in found if value != -inf}))
    return kept


def growing(count: int, version: int, begun: GroupRecord | None) -> list[Growing]:
    """The state from which a group's completions continue.

    Args:
        version: of the policy served now, for completions without a token.
        begun: tokens already sampled elsewhere.
    """
    if begun is None:
        return [Growing(version) for _ in range(count)]
    head = begun.head
    return [
        Growing(
            head.versions[at] if len(ids) else version,
            ids.tolist(),
            logprobs.tolist(),
            Kept([], []) if kept is None else Kept(kept.token_ids.tolist(), kept.counts.tolist()),
            at not in head.open,
            head.finished[at],
        )
        for at, ((ids, logprobs), kept) in enumerate(zip(begun.completions(), begun.kept_sets(), strict=True))
    ]


def as_record(prompt_ids: Sequence[int], group: Sequence[Growing]) -> GroupRecord:
    """A group with its tokens so far."""
    completions = [Completion(each.token_ids, each.logprobs, each.finished, each.version, each.kept) for each in group]
    return record_of(prompt_ids, completions, [at for at, each in enumerate(group) if not each.ended])


def request_of(each: Growing, sampling: Mapping[str, Any], index: int) -> dict[str, Any]:
    """Sampling parameters for the rest of the group's completion number `index`.

    Its random numbers differ from those of the beginning.
    """
    done, seed = len(each.token_ids), sampling.get("seed")
    if seed is not None:
        seed = zlib.crc32(f"{seed + index}/{done}".encode()) if done else seed + index
    return {
        **sampling,
        "n": 1,
        "seed": seed,
        "max_tokens": sampling["max_tokens"] - done,
        "logprobs": sampling.get("top_k", 0),
        "flat_logprobs": True,
        "detokenize": bool(sampling.get("stop")),
        "stream_interval": INTERVAL,
    }
