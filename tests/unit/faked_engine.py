"""An engine with fixed answers, and episodes that play on it; the tokenizer is real."""

import asyncio
from collections.abc import Awaitable, Callable
from functools import cache
from typing import Any

from ray.exceptions import ActorDiedError

from lorapar_ray.datasets.chat import Encoder, load_encoder
from lorapar_ray.engines.completion import Completion
from lorapar_ray.engines.record import GroupRecord, record_of
from lorapar_ray.grpo.environments import Trajectory, TurnEngine
from lorapar_ray.grpo.environments.episodes import EpisodeGroup
from lorapar_ray.grpo.environments.trajectory import Limits
from lorapar_ray.models import resolve_model

LIMITS = Limits(prompt=16, completion=64, vocabulary=49152)


Asked = tuple[str, list[int], dict[str, Any]]


@cache
def encoder() -> Encoder:
    return load_encoder(resolve_model("package:smollm2-135m-instruct"), None)


def plain(text: str) -> list[int]:
    ids: list[int] = encoder().tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


class Method:
    """Imitates a method of a Ray actor's handle."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self.remote = method

    def options(self, **_: Any) -> "Method":
        return self


class Engine:
    """Answers `says`, in each sample's turns, with version `version`; dies at its `dies`-th turn."""

    def __init__(self, *says: str, version: int = 0, dies: int | None = None) -> None:
        self.says, self.version, self.dies = [plain(text) for text in says], version, dies
        self.rollout, self.progress = Method(self._rollout), Method(self._progress)
        self.asked: list[Asked] = []

    def _rollout(self, ids: list[int], sampling: dict[str, Any], key: str, begun: Any) -> tuple[Any, Any]:
        self.asked.append((key, ids, sampling))
        if self.dies is not None and len(self.asked) >= self.dies:
            return failed(), None
        said = self.says[(int(key.rsplit("/", 1)[1]) - 1) % len(self.says)][: sampling["max_tokens"]]
        finished = len(said) < sampling["max_tokens"]
        record = record_of(ids, [Completion(said, [-0.5] * len(said), finished, self.version)])
        return answered(record), None

    def _progress(self) -> tuple[Any, Any]:
        return None, failed()


async def failed() -> Any:
    raise ActorDiedError()


async def answered(value: Any) -> Any:
    return value


def played(
    rollout: Callable[[TurnEngine, dict[str, Any]], Awaitable[Any]],
    engine: Engine,
    samples: int = 1,
    time_limit_s: float = 5.0,
    limits: Limits = LIMITS,
    row: dict[str, Any] | None = None,
) -> GroupRecord:
    async def go() -> GroupRecord:
        sampling = {"n": samples, "seed": 7, "temperature": 1.0, "stop": []}
        asked = row or {"prompt_ids": [5, 6, 7], "answer": "84"}
        group = EpisodeGroup("0/0/0/0", rollout, asked, encoder(), limits, sampling, time_limit_s)
        group.move_to(engine)
        return await group.play()

    return asyncio.run(go())


def adds(tokens: Any) -> Callable[..., Awaitable[Trajectory]]:
    """An environment that adds these between two turns."""

    async def rollout(engine: TurnEngine, row: dict[str, Any]) -> Trajectory:
        trajectory = engine.begin(row["prompt_ids"])
        await engine.generate(trajectory)
        trajectory.add(tokens)
        await engine.generate(trajectory)
        return trajectory

    return rollout


def rewards(reward: Any) -> Callable[..., Awaitable[Trajectory]]:
    """An environment that sets this reward."""

    async def rollout(engine: TurnEngine, row: dict[str, Any]) -> Trajectory:
        trajectory = engine.begin(row["prompt_ids"])
        await engine.generate(trajectory)
        trajectory.reward = reward
        return trajectory

    return rollout
