"""Requests to a model, as tokens, and its answers: the same for every kind of evaluation task.

Three kinds. `generate` continues a prompt; `score` gives the log-probability of each token from `start` on; `choose`
gives the log-probabilities of several possible next tokens. `choose` is `score` for answers of one token (" A", " B"):
one short request, which reads the prefix cache, instead of one for each choice, which cannot.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from typing import Any, Literal

import numpy as np
import pyarrow as pa

Kind = Literal["generate", "score", "choose"]
REQUEST_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("kind", pa.string()),
        ("ids", pa.list_(pa.int32())),
        ("start", pa.int32()),
        ("targets", pa.list_(pa.int32())),
        ("sampling", pa.string()),
    ]
)
ANSWER_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("tokens", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float64())),
        ("greedy", pa.list_(pa.bool_())),
    ]
)


@dataclass(frozen=True)
class Request:
    """One request."""

    kind: Kind
    ids: Sequence[int]
    """The prompt; for `score` including the tokens to score."""
    start: int = 0
    """`score`: index in `ids` of the first token to score, at least 1."""
    targets: Sequence[int] = ()
    """`choose`: the candidate next tokens after `ids`."""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """`generate`: arguments of `vllm.SamplingParams`."""
    repeat: int = 0
    """Number of this request among equal ones, for several samples of one prompt."""

    @cached_property
    def key(self) -> str:
        """Key of the request: equal for equal contents, so that a saved answer is found."""
        rest = json.dumps([self.kind, self.start, list(self.targets), dict(self.sampling), self.repeat], sort_keys=True)
        return sha256(np.asarray(self.ids, dtype=np.int32).tobytes() + rest.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Answer:
    """A model's answer to a request."""

    key: str
    tokens: Sequence[int] = ()
    """`generate`: the continuation, up to and with the first end token."""
    logprobs: Sequence[float] = ()
    """`score`: of `ids[start:]`; `choose`: of `targets`. In nats."""
    greedy: Sequence[bool] = ()
    """Whether each of those tokens is the most likely one in its place."""


def request_table(requests: Sequence[Request]) -> pa.Table:
    """Requests as a table, for sending."""
    columns = [
        [request.key for request in requests],
        [request.kind for request in requests],
        [list(request.ids) for request in requests],
        [request.start for request in requests],
        [list(request.targets) for request in requests],
        [json.dumps(dict(request.sampling)) for request in requests],
    ]
    return pa.table(
        [pa.array(column, kind.type) for column, kind in zip(columns, REQUEST_SCHEMA, strict=True)], REQUEST_SCHEMA
    )


def answer_table(answers: Sequence[Answer]) -> pa.Table:
    """Answers as a table, for sending and storing."""
    return pa.Table.from_pylist([vars(answer) for answer in answers], schema=ANSWER_SCHEMA)


def answers_of(table: pa.Table) -> list[Answer]:
    """The rows of an `answer_table`."""
    return [Answer(**{name: row[name] for name in ANSWER_SCHEMA.names}) for row in table.to_pylist()]
