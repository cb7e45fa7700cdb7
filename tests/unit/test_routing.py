"""The choice of a group's engine: room, speed, and prompts with the same beginning."""

from lorapar_ray.grpo.routing import BLOCK, BLOCKS, DURATIONS, Router, beginnings_of

SHOTS = list(range(2 * BLOCK))


def give(router: Router, prompt: list[int]) -> int:
    slot = router.choose(range(len(router.load)), beginnings_of(prompt))
    assert slot is not None
    router.begin(slot, beginnings_of(prompt), now=0.0)
    return slot


def test_beginnings_agree_as_far_as_prompts_do_and_cost_the_same_for_long_ones() -> None:
    first, second = beginnings_of([*SHOTS, *[7] * BLOCK]), beginnings_of([*SHOTS, *[8] * BLOCK])
    assert first[:2] == second[:2] and first[2] != second[2]
    assert beginnings_of([1] * (BLOCK - 1)) == [] and len(beginnings_of([1] * 100 * BLOCK)) == BLOCKS
    assert beginnings_of([*[9] * BLOCK, *SHOTS])[1] != first[1]


def test_a_prompt_goes_where_its_beginning_is_known_unless_that_engine_is_fuller() -> None:
    router = Router(2, at_once=4)
    assert give(router, [5] * BLOCK) == 0
    assert give(router, [6] * BLOCK) == 1
    assert [give(router, [6] * BLOCK) for _ in range(3)] == [1, 1, 0]  # while it is at most one fuller
    assert router.load == [2, 3]


def test_full_engines_are_left_alone() -> None:
    router = Router(2, at_once=1)
    assert [give(router, []), give(router, [])] == [0, 1]
    assert router.choose([0, 1]) is None
    router.end(1, now=1.0)
    assert router.choose([0]) is None and router.choose([0, 1]) == 1


def run(router: Router, slot: int, seconds: float, tokens: int) -> None:
    """Keep the engine full while twenty groups end there, one every `seconds`."""
    now = 0.0
    for _ in range(4):
        router.begin(slot, [], now)
    for _ in range(20):
        now += seconds
        router.end(slot, now, tokens, seconds)
        router.begin(slot, [], now)
    for _ in range(4):
        router.end(slot, now)


def test_a_slow_engine_holds_less_but_enough_to_measure_its_speed() -> None:
    router = Router(3, at_once=8)
    assert [router.cap(slot) for slot in range(3)] == [8, 8, 8]  # nothing has been measured yet
    run(router, 0, seconds=1.0, tokens=1000)
    run(router, 1, seconds=1.0, tokens=700)
    run(router, 2, seconds=10.0, tokens=1000)
    assert [router.cap(slot) for slot in range(3)] == [8, 6, 4]
    router.forget(2)  # another engine in its place
    assert router.cap(2) == 8 and router.load == [0, 0, 0]


def test_the_typical_time_is_known_after_enough_groups() -> None:
    router = Router(1, at_once=2)
    for count in range(DURATIONS):
        assert router.typical is None
        router.begin(0, [], 0.0)
        router.end(0, 1.0, 10, duration=float(count))
    assert router.typical == (DURATIONS - 1) / 2
