"""A grid's verdicts follow from the answers of its runs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lorapar_ray.ablations.grid import Claim, sentence
from lorapar_ray.ablations.grids import GRIDS
from lorapar_ray.ablations.results import Outcome, Verdict, sum_up, summarise
from lorapar_ray.ablations.results import decide as decided
from lorapar_ray.ablations.verdicts import Uncompared, effect, mean_interval, question_reach

CLAIM = Claim("the first beats the second", "first", "second")


def outcomes(*right: int, n: int = 200) -> list[Outcome]:
    return [Outcome(seed, {str(q): q < count for q in range(n)}, 1e-3, 0.4) for seed, count in enumerate(right)]


def decide(claim: Claim, better: list[Outcome], worse: list[Outcome]) -> Verdict:
    found = decided(claim, better, worse)
    assert isinstance(found, Verdict)
    return found


def test_a_claim_is_held_not_held_or_undecided() -> None:
    held = decide(CLAIM, outcomes(120, 124, 122), outcomes(90, 91, 95))
    assert held.found == "held" and held.effect.seeds == 3 and held.effect.questions == 200
    assert held.effect.difference == pytest.approx((30 + 33 + 27) / 600)
    assert "a difference of +15.0 points" in held.sentence and held.sentence.endswith("so the claim held here.")
    assert "over 3 seeds and n = 200 questions; exact sign test over questions, p = " in held.sentence
    reverse = decide(CLAIM, outcomes(90, 91, 95), outcomes(120, 124, 122))
    assert reverse.found == "not held"
    same = outcomes(*[500] * 3, n=1000)
    equal = decide(CLAIM, same, same)
    assert equal.found == "not held" and equal.p == 1
    assert equal.sentence.endswith("a difference within 1 point counts as none, so the claim did not hold here.")
    reached = decide(replace(CLAIM, reaches=True), same, same)
    assert reached.found == "held"
    assert reached.sentence.endswith("less than 1 point below counts as reached, so the claim held here.")
    noisy = decide(CLAIM, outcomes(120, 80, 110), outcomes(90, 100, 95))
    assert noisy.found == "undecided" and "is undecided" in noisy.sentence


def test_a_claim_without_results_is_undecided_and_says_so() -> None:
    none = decided(CLAIM, outcomes(120), [])
    assert isinstance(none, Uncompared) and none.found == "undecided"
    assert none.sentence == (
        "The first beats the second: first and second are not compared, since no seed has results of both, so it is "
        "undecided."
    )
    other = [replace(each, right={f"other {q}": True for q in range(9)}) for each in outcomes(1)]
    assert isinstance(decided(CLAIM, outcomes(1), other), Uncompared)
    some = decided(CLAIM, outcomes(120, 124, 122), outcomes(90, 91, 95, 96), [0, 1, 2, 3, 4])
    assert some.found == "held" and some.sentence.endswith(
        "so the claim held here. Seeds 3, 4 are left out: a run of the two has no results to compare."
    )


def test_a_claim_about_several_pairs_holds_if_it_holds_for_each() -> None:
    lines = [replace(CLAIM, worse=name) for name in ("second", "third", "fourth")]
    alone = Claim("another", "first", "second")
    held, noisy, higher = outcomes(*[700] * 3, n=1000), outcomes(690, 650, 720, n=1000), outcomes(*[800] * 3, n=1000)

    def whole(*others: list[Outcome]) -> tuple[str, str]:
        found = [decide(line, held, other) for line, other in zip(lines, others, strict=False)]
        [overall] = sum_up([*lines, alone], found)
        return overall.found, overall.sentence

    low = outcomes(*[500] * 3, n=1000)
    assert whole(low, low, low) == (
        "held",
        "The first beats the second, in each of 3 comparisons: 3 held, so the claim held here.",
    )
    assert whole(low, low)[0] == "undecided" and "2 held, 1 not finished, so it is undecided." in whole(low, low)[1]
    assert whole(low, noisy, low)[0] == "undecided"
    assert whole(low, higher)[0] == "not held" and "1 held, 1 did not hold, 1 not finished" in whole(low, higher)[1]
    assert sum_up([*lines, alone], []) == []
    texts = [each.text for name in ("activation", "theta") for each in GRIDS[name].claims]
    assert sorted(texts.count(text) for text in set(texts)) == [1, 8, 9]


@pytest.mark.parametrize("seeds", [1, 2])
def test_few_seeds_decide_nothing_about_arms(seeds: int) -> None:
    few = decide(CLAIM, outcomes(*[120] * seeds), outcomes(*[90] * seeds))
    assert few.found == "undecided" and few.effect.interval[0] > 0.05
    assert f"over n = 200 questions of {'one seed' if seeds == 1 else '2 seeds'}" in few.sentence
    assert few.sentence.endswith("so it is undecided (a verdict needs 3 seeds).")


def test_seeds_that_agree_on_one_question_of_a_hundred_decide_nothing() -> None:
    """The spread between seeds is 0 then, but another question would have been another difference."""
    three = decide(CLAIM, outcomes(51, 51, 51, n=100), outcomes(50, 50, 50, n=100))
    assert three.p == 1 and three.found == "undecided"
    low, high = three.effect.interval
    assert low < -0.01 and high > 0.03
    for some in (1, 2, 3, 20):  # however few questions there are, the same answers do not make two arms equal
        same = decide(replace(CLAIM, reaches=True), outcomes(*[1] * 3, n=some), outcomes(*[1] * 3, n=some))
        assert same.found == "undecided"


def test_an_interval_is_wider_than_that_over_seeds_and_that_over_questions() -> None:
    by_seed, by_question = [0.02, 0.05, 0.08], [1.0] * 12 + [-1.0] * 7 + [0.0] * 81
    whole, below = effect(by_seed, [by_question]), question_reach([by_question])[0]
    _, (low, high) = mean_interval(by_seed)
    assert whole.difference == pytest.approx(0.05) and whole.questions == 100
    assert whole.interval[0] == pytest.approx(0.05 - ((0.05 - low) ** 2 + below**2) ** 0.5)
    assert whole.interval[0] < min(low, 0.05 - below) and whole.interval[1] > high


def test_the_interval_over_questions_is_bonett_and_prices() -> None:
    """Of 12 questions gained and 7 lost of 100: (13 − 8) / 102 ± z · √((13 + 8 − 5² / 102) / 102²)."""
    below, above = question_reach([[1.0] * 12 + [-1.0] * 7 + [0.0] * 81])
    reach = 1.959964 * (21 - 25 / 102) ** 0.5 / 102
    assert (0.05 - below, 0.05 + above) == pytest.approx((5 / 102 - reach, 5 / 102 + reach))
    values = [1.0] * 120 + [-1.0] * 70 + [0.0] * 810
    apart = question_reach([[each / 2 for each in values]] * 2)[0]  # two groups, each a half of the difference
    assert apart == pytest.approx(question_reach([values])[0] / 2**0.5, rel=0.01)


def test_an_interval_ends_at_the_largest_possible_difference() -> None:
    most = decide(CLAIM, outcomes(*[3] * 3, n=3), outcomes(0, 0, 0, n=3))
    assert most.effect.interval[1] == 1 and "to +100.0 over" in most.sentence
    assert effect([0.9, 1.0, 0.2]).interval[1] == 1 < effect([0.9, 1.0, 0.2], largest=2).interval[1]


def test_two_seeds_answer_the_same_questions() -> None:
    """A question counts once: n runs with the same answers say no more about questions than one does."""
    one, two = (decide(CLAIM, outcomes(*[112] * n), outcomes(*[100] * n)) for n in (1, 2))
    assert one.p == two.p and one.effect.questions == two.effect.questions == 200 and two.effect.seeds == 2
    assert two.effect.interval == one.effect.interval
    assert "exact McNemar test, p" in one.sentence and "exact sign test over questions, p" in two.sentence
    assert summarise("arm", outcomes(100, 100)).interval == summarise("arm", outcomes(100)).interval
    tied = decide(CLAIM, outcomes(110, 100), outcomes(100, 110))
    assert tied.p == 1 and tied.effect.difference == 0


def test_less_than_the_margin_behind_is_not_refuted() -> None:
    """The whole interval may lie below 0 and the claim still be true."""
    whole = outcomes(*[4000] * 3, n=4000)
    close = decide(replace(CLAIM, reaches=True), outcomes(3980, 3979, 3979, n=4000), whole)
    assert close.effect.interval[1] < 0 and close.found == "held"
    unsure = decide(replace(CLAIM, reaches=True), outcomes(990, 986, 994, n=1000), outcomes(1000, 1000, 1000, n=1000))
    assert unsure.effect.interval[0] < -0.01 < unsure.effect.interval[1]
    assert unsure.found == "undecided"
    behind = decide(replace(CLAIM, reaches=True), outcomes(970, 971, 969, n=1000), outcomes(1000, 1000, 1000, n=1000))
    assert behind.found == "not held"


def test_a_claim_begins_its_sentence_and_a_symbol_stays_what_it_is() -> None:
    assert sentence("disjoint regions forget less") == "Disjoint regions forget less"
    assert sentence("α = β = 1 ends highest") == "α = β = 1 ends highest"


def test_several_claims_share_the_chance_of_a_wrong_verdict() -> None:
    """Each is decided at 1 − 0.05 / m."""
    better, worse = outcomes(110, 119, 113), outcomes(90, 91, 95)
    alone, one_of_7 = decide(CLAIM, better, worse), decided(CLAIM, better, worse, comparisons=7)
    assert isinstance(one_of_7, Verdict) and one_of_7.effect.interval == alone.effect.interval == alone.effect.deciding
    assert alone.found == "held" and one_of_7.found == "undecided"
    low, high = one_of_7.effect.deciding
    assert low < 0 < one_of_7.effect.interval[0] and high > one_of_7.effect.interval[1]
    assert (
        f"; at 99.29 %, which decides each of 7 claims, {100 * low:+.1f} to {100 * high:+.1f}; exact sign test"
        in one_of_7.sentence
    )
    assert "7 claims" not in alone.sentence
    by_seed = [0.02, 0.05, 0.08]
    over_seeds = 0.05 - mean_interval(by_seed, 1 - 0.05 / 7)[1][0]
    assert 0.05 - effect(by_seed, comparisons=7).deciding[0] == pytest.approx(over_seeds)
    back = one_of_7.effect.reverse
    assert back.deciding == (-high, -low) and back.difference == -one_of_7.effect.difference
    assert decided(CLAIM, better[:2], worse[:2], comparisons=7).sentence.count("claims") == 0


def test_the_interval_over_seeds_is_student_t() -> None:
    mean, (low, high) = mean_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3 and (low, high) == pytest.approx((3 - 1.9634, 3 + 1.9634), abs=1e-3)
