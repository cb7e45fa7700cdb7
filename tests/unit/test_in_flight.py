"""A group that is taken up by another engine: what was sampled stays, the rest is asked for, nothing is drawn twice."""

from types import SimpleNamespace

from lorapar_ray.engines.in_flight import Growing, as_record, growing, request_of

SAMPLING = {"n": 2, "temperature": 0.7, "max_tokens": 8, "stop": [], "stop_token_ids": [2], "seed": 11}


def handed(ids: list[int], reason: str | None) -> SimpleNamespace:
    """What vLLM hands over."""
    flat = SimpleNamespace(logprobs=[-float(each) for each in ids], start_indices=list(range(len(ids))))
    return SimpleNamespace(token_ids=ids, logprobs=flat, finish_reason=reason)


def test_a_group_that_is_given_back_goes_on_where_it_was() -> None:
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


def test_a_completion_without_a_token_begins_under_the_policy_of_whoever_takes_it_up() -> None:
    assert growing(1, version=4, begun=as_record([1], [Growing(3)])) == [Growing(4)]


def test_the_rest_is_asked_for_with_other_random_numbers() -> None:
    fresh, begun = Growing(0), Growing(0, [5, 6, 7], [-1.0] * 3)
    assert [request_of(fresh, SAMPLING, index)["seed"] for index in (0, 1)] == [11, 12]
    asked = request_of(begun, SAMPLING, 0)
    assert asked["seed"] not in (11, 12) and asked["seed"] == request_of(begun, SAMPLING, 0)["seed"]
    assert (asked["n"], asked["max_tokens"], asked["temperature"], asked["detokenize"]) == (1, 5, 0.7, False)
    assert request_of(fresh, {**SAMPLING, "stop": ["x"]}, 0)["detokenize"]
    assert request_of(fresh, {**SAMPLING, "seed": None}, 1)["seed"] is None
