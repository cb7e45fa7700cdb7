"""Distributes completions over learners so that all compute about equally long: a pure function of lengths.

A learner that packs computes a prompt once for all of its completions. So its work is the sum over its groups of prompt
and completion tokens; a group that is split over two learners computes its prompt twice. Other learners compute the
prompt again with each completion.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import replace

from lorapar_ray.engines.record import GroupHead

BALANCED = 0.05
"""Allowed gap between the fullest and the emptiest learner, as a share of the fullest's tokens; above it groups are
split."""

Hand = dict[int, list[int]]
"""One learner's: completions by group."""


def deal(
    groups: Sequence[GroupHead], chosen: Sequence[Sequence[int]], learners: int, packed: bool = True
) -> list[Hand]:
    """Deal the chosen completions of every group.

    Whole groups go, the longest first, to the learner with the least so far. Then, while the gap between the emptiest
    and the fullest learner exceeds `BALANCED`, single completions move from the fullest to the emptiest. At the end the
    gap is within `BALANCED`, or every completion of the fullest, with its prompt, is at least as long as the gap. An
    empty completion only moves with its whole group: alone it would cost a prompt and save nothing.

    Args:
        chosen: completions of each group that are trained on; a group without any is left out.
        packed: learners compute a prompt once for a group's completions, not with each.
    """
    groups = groups if packed else [_with_own_prompts(group) for group in groups]
    hands: list[Hand] = [{} for _ in range(learners)]
    sizes = [_size(group, own) for group, own in zip(groups, chosen, strict=True)]
    loads = [(0, learner) for learner in range(learners)]
    for number in sorted(range(len(groups)), key=sizes.__getitem__, reverse=True):
        if chosen[number]:
            load, learner = loads[0]
            hands[learner][number] = list(chosen[number])
            heapq.heapreplace(loads, (load + sizes[number], learner))
    if learners > 1:
        _even_out(groups, hands, [load for load, _ in sorted(loads, key=lambda each: each[1])])
    return hands


def tokens_of(groups: Sequence[GroupHead], hand: Hand) -> int:
    """Tokens that a learner computes for its share."""
    return sum(_size(groups[number], own) for number, own in hand.items())


def _with_own_prompts(group: GroupHead) -> GroupHead:
    """The group as one without a common prompt."""
    return replace(group, prompt_tokens=0, lengths=tuple(group.prompt_tokens + length for length in group.lengths))


def _even_out(groups: Sequence[GroupHead], hands: list[Hand], loads: list[int]) -> None:
    while True:
        fullest, emptiest = loads.index(max(loads)), loads.index(min(loads))
        gap = loads[fullest] - loads[emptiest]
        if gap <= BALANCED * loads[fullest]:
            return
        best = min(_moves(groups, hands[fullest], hands[emptiest], gap), default=None)
        if best is None:
            return
        _, number, completion, saved, cost = best
        hands[fullest][number].remove(completion)
        if not hands[fullest][number]:
            del hands[fullest][number]
        hands[emptiest].setdefault(number, []).append(completion)
        loads[fullest] -= saved
        loads[emptiest] += cost


def _moves(groups: Sequence[GroupHead], giver: Hand, taker: Hand, gap: int) -> list[tuple[int, int, int, int, int]]:
    """(larger load after the move relative to the giver's load now, group, completion, giver's saving, taker's cost) of
    every move that reduces the larger of the two loads."""
    found = []
    for number, own in giver.items():
        group = groups[number]
        for completion in own:
            length = group.lengths[completion]
            saved = length + (group.prompt_tokens if len(own) == 1 else 0)
            cost = length + (0 if number in taker else group.prompt_tokens)
            larger = max(-saved, cost - gap)
            if larger < 0:
                found.append((larger, number, completion, saved, cost))
    return found


def _size(group: GroupHead, completions: Sequence[int]) -> int:
    return group.prompt_tokens + sum(group.lengths[each] for each in completions) if completions else 0
