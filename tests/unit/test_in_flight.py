"""A group that another engine continues: sampled tokens stay, the rest is requested, nothing is drawn twice."""

import asyncio
import math
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from lorapar_ray.engines.actor import EngineActor
from lorapar_ray.engines.in_flight import Growing, as_record, growing, request_of

SAMPLING = {"n": 2, "temperature": 0.7, "max_tokens": 8, "stop": [], "stop_token_ids": [2], "seed": 11}


def handed(ids: list[int], reason: str | None) -> SimpleNamespace:
    """An output of vLLM."""
    places = list(range(len(ids)))
    flat = SimpleNamespace(
        token_ids=ids,
        logprobs=[-float(each) for each in ids],
        start_indices=places,
        end_indices=[place + 1 for place in places],
    )
    return SimpleNamespace(token_ids=ids, logprobs=flat, finish_reason=reason)


def test_a_group_given_back_continues_where_it_was() -> None:
    first, second = growing(2, version=3, begun=None)
    first.take(handed([5, 6], None))
    first.take(handed([2], "stop"))
    second.take(handed([7, 8, 9], None))
    second.take(handed([4], "abort"))
    record = as_record([1, 1], [first, second])
    head = record.head
    assert (head.prompt_tokens, head.lengths, head.finished, head.versions, head.open) == (
        2,
        (3, 4),
        (True, False),
        (3, 3),
        (1,),
    )
    again = growing(2, version=4, begun=record)
    assert again == [first, Growing(3, [7, 8, 9, 4], [-7.0, -8.0, -9.0, -4.0])]
    again[1].take(handed([3, 3, 3, 3], "length"))
    whole = as_record([1, 1], again)
    assert whole.head.open == () and whole.head.finished == (True, False) and whole.head.lengths == (3, 8)
    assert [ids.tolist() for ids, _ in whole.completions()] == [[5, 6, 2], [7, 8, 9, 4, 3, 3, 3, 3]]
    assert whole.logprobs.tolist() == [-5.0, -6.0, -2.0, -7.0, -8.0, -9.0, -4.0, -3.0, -3.0, -3.0, -3.0]


def test_kept_sets_stay_with_their_tokens() -> None:
    def cut(token: int, *others: tuple[int, float]) -> SimpleNamespace:
        """In vLLM's order: the sampled token first, then the likeliest ones, with or without it."""
        ids, values = [token, *(each for each, _ in others)], [-0.5, *(value for _, value in others)]
        flat = SimpleNamespace(token_ids=ids, logprobs=values, start_indices=[0], end_indices=[len(ids)])
        return SimpleNamespace(token_ids=[token], logprobs=flat, finish_reason=None)

    first, second = growing(2, version=0, begun=None)
    first.take(cut(7, (9, -0.4), (7, -0.5), (3, -math.inf)))
    first.take(cut(4, (4, 0.0), (8, -math.inf), (3, -math.inf)))
    second.take(cut(5, (6, -0.1)))
    record = as_record([1], [first, second])
    kept, other = record.kept_sets()
    assert kept is not None and other is not None
    assert (kept.token_ids.tolist(), kept.counts.tolist()) == ([7, 9, 4], [2, 1])
    assert (other.token_ids.tolist(), other.counts.tolist()) == ([5, 6], [2])
    again = growing(2, version=1, begun=record)
    assert again == [first, second]
    again[1].take(cut(6, (6, 0.0)))
    assert as_record([1], again).kept_sets()[1].counts.tolist() == [2, 1]  # type: ignore[union-attr]
    assert as_record([1], growing(1, 0, None)).kept is None
    assert request_of(first, {**SAMPLING, "top_k": 20}, 0)["logprobs"] == 20


def test_a_completion_without_a_token_gets_the_policy_of_the_next_engine() -> None:
    assert growing(1, version=4, begun=as_record([1], [Growing(3)])) == [Growing(4)]


def test_the_rest_is_sampled_with_other_random_numbers() -> None:
    fresh, begun = Growing(0), Growing(0, [5, 6, 7], [-1.0] * 3)
    assert [request_of(fresh, SAMPLING, index)["seed"] for index in (0, 1)] == [11, 12]
    asked = request_of(begun, SAMPLING, 0)
    assert asked["seed"] not in (11, 12) and asked["seed"] == request_of(begun, SAMPLING, 0)["seed"]
    assert (asked["n"], asked["max_tokens"], asked["temperature"], asked["detokenize"]) == (1, 5, 0.7, False)
    assert request_of(fresh, {**SAMPLING, "stop": ["x"]}, 0)["detokenize"]
    assert request_of(fresh, {**SAMPLING, "seed": None}, 1)["seed"] is None


class Loading(EngineActor):
    """A fake without vLLM: its policy is being loaded, and it notes what it would sample."""

    def __init__(self) -> None:
        super().__init__({}, "merged")
        self.sampled = 0
        self._served[0].open.clear()

    async def _stream(self, *_: Any, **__: Any) -> AsyncIterator[Any]:
        self.sampled += 1
        yield SimpleNamespace(outputs=[handed([7, 2], "stop")])

    async def loaded(self) -> None:
        self._served[0].version = 5
        self._served[0].open.set()


@pytest.mark.slow  # imports vLLM
def test_a_group_given_back_while_it_waits_for_a_policy_is_not_sampled() -> None:
    begun = as_record([1, 1], [Growing(3, [5, 6], [-1.0, -1.0]), Growing(3)])

    async def go() -> None:
        engine = Loading()
        unwanted = asyncio.create_task(engine.rollout([1, 1], SAMPLING, "unwanted", {"unwanted": begun}))
        wanted = asyncio.create_task(engine.rollout([1, 1], SAMPLING, "wanted"))
        await asyncio.sleep(0)
        await engine.give_back("unwanted")
        await engine.loaded()
        _, head = await unwanted
        assert (head.lengths, head.open, head.versions) == ((2, 0), (0, 1), (3, 5))
        _, head = await wanted
        assert (head.lengths, head.open, head.versions) == ((2, 2), (), (5, 5)) and engine.sampled == 2

    asyncio.run(go())
