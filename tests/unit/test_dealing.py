"""Completions are dealt to learners once each, evenly, and in whole groups if that is even enough."""

from hypothesis import given, settings
from hypothesis import strategies as st

from lorapar_ray.engines.record import GroupHead
from lorapar_ray.grpo.dealing import BALANCED, deal, tokens_of


def head(prompt: int, lengths: list[int]) -> GroupHead:
    return GroupHead(prompt, tuple(lengths), (True,) * len(lengths), (0,) * len(lengths))


LENGTHS = st.lists(st.integers(1, 8192), min_size=1, max_size=8)
GROUPS = st.lists(st.builds(head, st.integers(1, 1024), LENGTHS), max_size=24)


@given(GROUPS, st.integers(1, 9), st.randoms(use_true_random=False))
def test_every_chosen_completion_is_dealt_once_and_evenly(groups: list[GroupHead], learners: int, draw: object) -> None:
    chosen = [[each for each in range(len(group.lengths)) if draw.random() < 0.8] for group in groups]  # type: ignore[attr-defined]
    hands = deal(groups, chosen, learners)
    dealt = sorted((number, each) for hand in hands for number, own in hand.items() for each in own)
    assert dealt == [(number, each) for number, own in enumerate(chosen) for each in own]
    assert all(own for hand in hands for own in hand.values())
    loads = [tokens_of(groups, hand) for hand in hands]
    gap, fullest = max(loads) - min(loads), hands[loads.index(max(loads))]
    sizes = [groups[at].prompt_tokens + groups[at].lengths[each] for at, own in fullest.items() for each in own]
    assert gap <= max(BALANCED * max(loads), min(sizes, default=0))


@settings(max_examples=20)
@given(st.lists(st.lists(st.integers(1, 4096), min_size=8, max_size=8), min_size=32, max_size=48), st.integers(2, 4))
def test_many_groups_for_each_learner_stay_whole_and_within_the_bound(lengths: list[list[int]], learners: int) -> None:
    groups = [head(100, each) for each in lengths]
    hands = deal(groups, [range(8)] * len(groups), learners)
    loads = [tokens_of(groups, hand) for hand in hands]
    assert max(loads) - min(loads) <= max(BALANCED * max(loads), 4096 + 100)


def test_completions_that_each_compute_the_prompt_again_are_dealt_by_what_they_compute() -> None:
    groups = [head(10, [134] * 8), head(1000, [10] * 8), head(999, [10] * 8), head(6, [134] * 8)]
    hands = deal(groups, [range(8)] * 4, 2, packed=False)
    dealt = sorted((number, each) for hand in hands for number, own in hand.items() for each in own)
    assert dealt == [(number, each) for number in range(4) for each in range(8)]
    loads = [
        sum(groups[number].prompt_tokens + groups[number].lengths[each] for number, own in hand.items() for each in own)
        for hand in hands
    ]
    assert max(loads) - min(loads) <= BALANCED * max(loads)


def test_empty_completions_are_dealt_without_computing_their_prompt_twice() -> None:
    [first, second] = deal([head(1, [0, 1])], [range(2)], 2)
    assert (first, second) == ({0: [0, 1]}, {})
    groups = [head(9, [0, 0]), head(9, [0])]
    assert sorted(str(hand) for hand in deal(groups, [range(2), range(1)], 2)) == ["{0: [0, 1]}", "{1: [0]}"]


def test_a_group_is_cut_only_where_whole_ones_are_uneven() -> None:
    even = [head(10, [50, 50]), head(10, [60, 40]), head(10, [50, 49]), head(10, [51, 50])]
    assert all(own == [0, 1] for hand in deal(even, [range(2)] * 4, 2) for own in hand.values())
    [first, second] = deal([head(10, [100, 100, 100, 100])], [range(4)], 2)
    assert (len(first[0]), len(second[0])) == (2, 2)
    assert deal([head(100, [50])], [range(1)], 2) == [{0: [0]}, {}]
    assert deal([], [], 3) == [{}, {}, {}]
