"""The step size that `Balance` chooses from step times, compared with the best of a grid, on a simulated cluster.

The simulation computes a step's time: completions of log-normal length on engines with several slots, a learner, and
the fixed time of a step.
"""

import heapq
import random
from statistics import fmean

import pytest

from lorapar_ray.grpo.balance import Balance, fitted

GRID = (4, 8, 16, 32, 64, 128, 256)
GROUP = 8


def step_seconds(prompts: int, engines: int, overlap: bool, draw: random.Random, fixed_s: float) -> float:
    """Each sequence takes the first free slot; the learner takes two thirds of that time, in parallel or afterwards."""
    slots = [0.0] * (engines * 16)
    work = 0.0
    for _ in range(prompts * GROUP):
        length = min(4.0, draw.lognormvariate(0.0, 0.6))
        work += length
        heapq.heapreplace(slots, slots[0] + length)
    sampling, learning = max(slots), 2 / 3 * work / len(slots)
    return fixed_s + (max(sampling, learning) if overlap else sampling + learning)


@pytest.mark.parametrize("engines", [1, 8])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("fixed_s", [0.2, 4.0])
@pytest.mark.parametrize("begin", [4, 256])
def test_within_twenty_steps_it_reaches_nine_tenths_of_the_grids_best(
    engines: int, overlap: bool, fixed_s: float, begin: int
) -> None:
    draw = random.Random(0)

    def rate(prompts: int) -> float:
        return prompts / fmean(step_seconds(prompts, engines, overlap, draw, fixed_s) for _ in range(8))

    rates = {prompts: rate(prompts) for prompts in GRID}
    balance = Balance(begin, (GRID[0], GRID[-1]))
    for _ in range(20):
        prompts = balance.prompts
        balance.observe(prompts, step_seconds(prompts, engines, overlap, draw, fixed_s))
    assert rate(balance.prompts) >= 0.9 * max(rates.values()), (balance.prompts, rates)
    if begin > 4 and engines == 1 and fixed_s < 1:  # and the step is no larger than necessary
        assert balance.prompts <= 128


def test_fixed_time_and_time_per_prompt_are_separated() -> None:
    assert fitted([(4, 3.0), (8, 5.0), (16, 9.0)]) == pytest.approx((1.0, 0.5))


def test_it_stays_within_bounds_and_resumes() -> None:
    balance = Balance(1, (6, 10))
    assert balance.prompts == 6
    for _ in range(3):
        balance.observe(balance.prompts, 100.0)  # every size takes the same time: the largest is best
    assert balance.prompts == 10
    other = Balance(6, (6, 10))
    other.restore(balance.state())
    assert other.state() == balance.state() and other.prompts == 10
    for _ in range(20):  # it has measured that smaller steps are not better, and does not try again
        balance.observe(10, 100.0)
        assert balance.prompts == 10
    assert len(balance.state()) <= 9
