"""Rollout engines that several runs share."""

import pickle
from typing import Any

from lorapar_ray.engines.arm_handle import ArmHandle
from lorapar_ray.grpo.shared_engines import SharedEngines


class Method:
    """Imitates a method of a Ray actor's handle: returns what it is called with."""

    def __init__(self, **options: Any) -> None:
        self.given = options

    def options(self, **options: Any) -> "Method":
        return Method(**options)

    def remote(self, *arguments: Any, **named: Any) -> tuple[Any, ...]:
        return (*arguments, named, self.given)


class Engine:
    """Imitates a Ray actor's handle."""

    rollout = start = Method()


def test_a_place_has_one_engine_until_a_run_loses_it() -> None:
    made: list[int] = []
    shared = SharedEngines(lambda slot: made.append(slot) or Engine())  # type: ignore[func-returns-value]
    first, second, other = shared.engine(0, 0), shared.engine(1, 0), shared.engine(0, 1)
    assert first.actor is second.actor is not other.actor and made == [0, 1]
    replaced = shared.engine(1, 0)  # the second run has lost it
    assert replaced.actor is not second.actor and made == [0, 1, 0]
    assert shared.engine(0, 0).actor is replaced.actor and made == [0, 1, 0]  # the first one notices later
    again = shared.engine(0, 0)
    assert again.actor is not replaced.actor and shared.engine(1, 0).actor is again.actor and made == [0, 1, 0, 0]


def test_calls_say_which_arm_they_concern() -> None:
    handle = pickle.loads(pickle.dumps(ArmHandle(Engine(), 2)))
    assert handle.rollout.remote(1, key="a") == (1, {"key": "a", "arm": 2}, {})
    assert handle.rollout.options(num_returns=2).remote(1) == (1, {"arm": 2}, {"num_returns": 2})
    assert handle.start.remote() == ({}, {})
