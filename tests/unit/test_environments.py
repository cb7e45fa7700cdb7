"""Environments: what a trajectory may contain, which tokens are trained on, and what a failed episode loses.

The engine is a fake with fixed answers; the learner's model, the tokenizer and the records are real.
"""

import asyncio
import signal
import sys
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray.exceptions import ActorDiedError

from lorapar_ray.config import GrpoConfig
from lorapar_ray.datasets.chat import Encoder, load_encoder
from lorapar_ray.engines.completion import Completion
from lorapar_ray.engines.record import GroupHead, GroupRecord, record_of
from lorapar_ray.errors import UserError
from lorapar_ray.grpo.advantages import group_advantages
from lorapar_ray.grpo.batches import make_batch, mini_batches, shares_of
from lorapar_ray.grpo.engine_pool import EnginePool
from lorapar_ray.grpo.environments import Trajectory, Turn, TurnEngine
from lorapar_ray.grpo.environments.actor import EnvironmentActor, row_of
from lorapar_ray.grpo.environments.calculator import calculate
from lorapar_ray.grpo.environments.calculator import rollout as calculator
from lorapar_ray.grpo.environments.episodes import LEFT, EpisodeGroup
from lorapar_ray.grpo.environments.registry import get_environment
from lorapar_ray.grpo.environments.trajectory import Limits, as_record
from lorapar_ray.grpo.failures import Failures
from lorapar_ray.grpo.groups import Group
from lorapar_ray.grpo.head import TokenScorer
from lorapar_ray.grpo.packing import micro_batches, pack, packed_logprobs, pad
from lorapar_ray.grpo.rewards import RewardBatch, reading
from lorapar_ray.grpo.rewards.reading import Reader, Request
from lorapar_ray.grpo.rollouts import Rollouts
from lorapar_ray.grpo.samples import Sample
from lorapar_ray.models import architecture, resolve_model
from lorapar_ray.packed_attention import use_packed_attention
from tests.unit.test_packed_learner import CPU, frozen_head
from tests.unit.tiny_models import tiny

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


def test_sampled_tokens_stay_unchanged_and_a_tools_tokens_are_marked() -> None:
    engine = Engine("It is <calc>12 * 7</calc>", "so 84.<|im_end|>", version=3)
    record = played(calculator, engine, samples=2)
    first, reply, last = (plain(text) for text in ("It is <calc>12 * 7</calc>", " = 84\n", "so 84.<|im_end|>"))
    for (ids, logprobs), mask in zip(record.completions(), record.masks(), strict=True):
        assert ids.tolist() == [*first, *reply, *last]
        assert mask is not None and mask.tolist() == [True] * len(first) + [False] * len(reply) + [True] * len(last)
        assert logprobs.tolist() == np.where(mask, -0.5, 0.0).tolist()
    head = record.head
    assert head.sampled == (len(first) + len(last),) * 2 == head.trained
    assert (head.turns, head.finished, head.versions, head.lost) == ((2, 2), (True, True), (3, 3), ())
    seen = [ids for _, ids, _ in engine.asked]
    assert seen == [[5, 6, 7]] * 2 + [[5, 6, 7, *first, *reply]] * 2
    assert len({sampling["seed"] for _, _, sampling in engine.asked}) == 4
    assert all(sampling["stop"] == ["</calc>"] and sampling["n"] == 1 for _, _, sampling in engine.asked)


def test_the_calculator_calculates_and_takes_nothing_else() -> None:
    assert [calculate(each) for each in ("12 * 7", "1/3 + 1/6", "-(2.5 - 4) * 2")] == ["84", "1/2", "3"]
    assert {calculate(each) for each in ("2 ** 9", "__import__('os')", "1/0", "9" * 99, "True + 1", "(")} == {"error"}


def test_an_environments_tokens_are_read_but_neither_predicted_nor_counted() -> None:
    model = frozen_head(tiny())
    trajectories = []
    for said in ((9, 8), (30, 31, 32)):
        trajectory = Trajectory([5, 6, 7], Limits(16, 64, 96))
        for turn in (said, said[::-1]):
            trajectory.take(turn, [-1.0] * len(turn), Turn(list(turn), True, 0))
            trajectory.add([40, 41])
        trajectory.reward = float(len(said))
        trajectories.append(trajectory)
    record = as_record(trajectories, [])
    group = Group(0, record, record.head)
    group.take(RewardBatch([2.0, 3.0], {"r": [2.0, 3.0]}, {}), GrpoConfig())
    batch = make_batch([group], [], [0], 1, {}, [{"prompt": "", "answer": ""}])
    assert (batch.metrics["completion_length"], batch.metrics["trajectory_length"]) == (5, 7)
    [share] = shares_of(batch, 1, GrpoConfig(group_size=2))
    [update] = mini_batches(share, {0: record})
    assert update.tokens == share.tokens == 10 and [each.count for each in update.samples] == [4, 6]
    expected = []
    for sample in update.samples:
        ids = [*sample.prompt_ids.tolist(), *sample.token_ids.tolist()]
        logprobs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        whole = logprobs[torch.arange(len(ids) - 1), torch.tensor(ids[1:])][len(sample.prompt_ids) - 1 :]
        expected.append(whole[torch.from_numpy(sample.sampled)])
    expected_BT = torch.nn.utils.rnn.pad_sequence(expected, batch_first=True)
    for packed in (False, True):
        assert not packed or use_packed_attention(model)
        rows = pack([update.samples], CPU) if packed else pad(update.samples, 0, CPU)
        found_BT, _ = packed_logprobs(TokenScorer(model), rows, temperature=1.0)
        torch.testing.assert_close(found_BT, expected_BT, atol=2e-5, rtol=1e-4)
        assert rows.mask_BT.sum(1).tolist() == [4, 6] and rows.tokens_N.tolist() == [9, 8, 8, 9, 30, 31, 32, 32, 31, 30]
        assert not set(rows.tokens_N.tolist()) & {40, 41}


def test_samples_without_a_common_prompt_are_packed() -> None:
    """Two groups: the one without a common prompt may be the row's first, or follow another."""
    records = []
    for prompts in (([5, 6], [7, 8]), ([9, 6], [9, 8]), ([11], [12, 13])):
        trajectories = [Trajectory(prompt, Limits(16, 64, 96)) for prompt in prompts]
        for number, trajectory in enumerate(trajectories):
            said = [30, 31, 32][: number + 1]
            trajectory.take(said, [-1.0] * len(said), Turn(said, True, 0))
        records.append(as_record(trajectories, []))
    assert [record.head.prompt_tokens for record in records] == [0, 1, 0]
    groups = []
    for record in records:
        found = zip(record.completions(), record.masks(), strict=True)
        groups.append([Sample(record.prompt_ids, *one, 1.0, True, 0, sampled) for one, sampled in found])
    padded = pad([sample for group in groups for sample in group], 0, CPU)
    packed = pack(groups, CPU)
    model = frozen_head(tiny())
    expected, _ = packed_logprobs(TokenScorer(model), padded, temperature=1.0)
    assert use_packed_attention(model)
    ours, _ = packed_logprobs(TokenScorer(model), packed, temperature=1.0)
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-4)
    assert packed.tokens_N.tolist() == padded.tokens_N.tolist() == [30, 30, 31] * 3


def test_tokens_of_a_samples_own_prompt_are_no_part_of_its_length() -> None:
    limits, trajectories = Limits(prompt=16, completion=10, vocabulary=96), []
    for first, said in ((5, [30, 31]), (6, [30, 31, 32, 33, 34, 35, 36, 37, 38, 39])):
        trajectory = Trajectory([first, *range(10, 18)], limits)
        trajectory.take(said, [-1.0] * len(said), Turn(said, True, 0))
        trajectories.append(trajectory)
    record = as_record(trajectories, [])
    assert record.head.lengths == (11, 19) and record.head.answers == (2, 10)
    group = Group(0, record, record.head)
    group.take(RewardBatch([1.0, 1.0], {}, {}), GrpoConfig(max_completion_length=10, overlong_cache=2))
    assert group.rewards == [1.0, 0.0] and group.parts["overlong"] == [0.0, -1.0]
    assert make_batch([group], [], [0], 1, {}, [{"prompt": "", "answer": ""}]).metrics["trajectory_length"] == 6


def test_only_a_trajectory_without_room_is_truncated() -> None:
    async def two_tokens(engine: TurnEngine, row: dict[str, Any]) -> Trajectory:
        trajectory = engine.begin(row["prompt_ids"])
        await engine.generate(trajectory, max_tokens=2)
        return trajectory

    long = Engine("one two three four five")
    assert [played(two_tokens, long, limits=Limits(16, room, 49152)).head.finished for room in (3, 2)] == [
        (True,),
        (False,),
    ]


def adds(tokens: Any) -> Callable[..., Awaitable[Trajectory]]:
    """An environment that adds these between two turns."""

    async def rollout(engine: TurnEngine, row: dict[str, Any]) -> Trajectory:
        trajectory = engine.begin(row["prompt_ids"])
        await engine.generate(trajectory)
        trajectory.add(tokens)
        await engine.generate(trajectory)
        return trajectory

    return rollout


def begins(prompt: list[int]) -> Callable[..., Awaitable[Trajectory]]:
    """An environment with a prompt of its own."""

    async def rollout(engine: TurnEngine, row: dict[str, Any]) -> Trajectory:
        trajectory = engine.begin(prompt)
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


async def never_full(engine: TurnEngine, row: dict[str, Any]) -> Trajectory:
    trajectory = engine.begin(row["prompt_ids"])
    while True:
        await engine.generate(trajectory)


async def silent(engine: TurnEngine, row: dict[str, Any]) -> Trajectory:
    return engine.begin(row["prompt_ids"])


async def no_trajectory(engine: TurnEngine, row: dict[str, Any]) -> Any:
    return "42"


async def hangs(engine: TurnEngine, row: dict[str, Any]) -> Trajectory:
    trajectory = engine.begin(row["prompt_ids"])
    await engine.generate(trajectory)
    await asyncio.Event().wait()
    return trajectory


async def leaves(engine: TurnEngine, row: dict[str, Any]) -> Trajectory:
    raise SystemExit(3)


async def cancels(engine: TurnEngine, row: dict[str, Any]) -> Trajectory:
    own = asyncio.ensure_future(asyncio.Event().wait())
    own.cancel()
    await own
    return engine.begin(row["prompt_ids"])


async def cancels_itself(engine: TurnEngine, row: dict[str, Any]) -> Trajectory:
    own = asyncio.current_task()
    assert own is not None
    own.cancel()
    await asyncio.Event().wait()
    return engine.begin(row["prompt_ids"])


@pytest.mark.parametrize(
    ("rollout", "told"),
    [
        (adds([5, 200_000]), "'200000' is not one of the model's 49152 tokens"),
        (adds([-1]), "'-1' is not one of the model's 49152 tokens"),
        (adds("text"), "'t' is not one of the model's 49152 tokens"),
        (adds(np.array([1.5], np.float32)), "'1.5' is not one of the model's 49152 tokens"),
        (begins([5, 49152]), "'49152' is not one of the model's 49152 tokens"),
        (never_full, "all 64 tokens of grpo.max_completion_length"),
        (adds([5] * 1000), "all 64 tokens of grpo.max_completion_length"),
        (begins([5] * 17), "a prompt of 17 tokens; 1 to 16 are allowed (grpo.max_prompt_length)"),
        (begins([]), "a prompt of 0 tokens; 1 to 16 are allowed (grpo.max_prompt_length)"),
        (silent, "the policy sampled nothing"),
        (rewards([1.0, 0.0]), "its reward is [1.0, 0.0]; give one finite number, or None"),
        (rewards([]), "its reward is []; give one finite number, or None"),
        (rewards(torch.ones(1)), "its reward is tensor([1.]); give one finite number, or None"),
        (rewards(float("nan")), "its reward is nan; give one finite number, or None"),
        (rewards("good"), "its reward is good; give one finite number, or None"),
        (no_trajectory, "it returns str, not the trajectory"),
        (hangs, "longer than grpo.environment_time_limit_s (0.05)"),
        (leaves, "SystemExit: 3"),
        (cancels, "CancelledError: it awaits a task that was cancelled"),
        (cancels_itself, "CancelledError: it cancels its own task"),
    ],
)
def test_a_failed_episode_loses_only_its_sample(rollout: Any, told: str) -> None:
    episodes = iter([rollout, calculator, calculator])

    async def either(engine: TurnEngine, row: dict[str, Any]) -> Trajectory:
        found: Trajectory = await next(episodes)(engine, row)
        return found

    record = played(either, Engine("one word"), samples=3, time_limit_s=0.05 if rollout is hangs else 5.0)
    [lost] = record.head.lost
    assert told in lost and len(record.head.lengths) == len(record.completions()) == 2


@pytest.mark.parametrize("embeddings", [100, 60000])
def test_a_tokenizers_tokens_beyond_the_models_embeddings_are_refused(embeddings: int, tmp_path: Path) -> None:
    encoder().tokenizer.save_pretrained(tmp_path)
    config = architecture(resolve_model("package:smollm2-135m-instruct"), trust_remote_code=False)
    config.vocab_size = embeddings
    config.save_pretrained(tmp_path)
    settings = {"environment": "lorapar_ray.grpo.environments.calculator:rollout", "rewards": [{"name": "environment"}]}
    worker = EnvironmentActor({"settings": settings, "rows": [], "model": str(tmp_path), "trust_remote_code": False})
    assert worker._limits.vocabulary == min(embeddings, len(encoder().tokenizer))


@pytest.mark.parametrize("asks", [False, True])
def test_an_episode_that_swallows_its_cancellation_loses_only_its_sample(asks: bool) -> None:
    """It waits again, or asks the engine again, after every error."""
    running, cancelled, first = True, 0, iter([True])

    async def stubborn(engine: TurnEngine, row: dict[str, Any]) -> Trajectory:
        nonlocal cancelled
        if next(first, False):
            trajectory = engine.begin(row["prompt_ids"])
            while running:
                try:
                    await (engine.generate(trajectory) if asks and cancelled else asyncio.Event().wait())
                except BaseException:
                    cancelled += 1
            return trajectory
        return await calculator(engine, row)

    async def go() -> GroupRecord:
        nonlocal running
        sampling = {"n": 3, "seed": 7, "temperature": 1.0, "stop": []}
        group = EpisodeGroup("k", stubborn, {"prompt_ids": [5]}, encoder(), LIMITS, sampling, 0.05)
        group.move_to(Engine("one word"))
        record = await asyncio.wait_for(group.play(), 60)
        assert len(LEFT) == 1
        running = False
        return record

    record = asyncio.run(go())
    [lost] = record.head.lost
    assert "longer than grpo.environment_time_limit_s (0.05)" in lost and len(record.head.lengths) == 2
    assert cancelled > 1 and not LEFT


def test_an_episode_may_return_what_it_has_when_its_time_is_up() -> None:
    async def careful(engine: TurnEngine, row: dict[str, Any]) -> Trajectory:
        trajectory = engine.begin(row["prompt_ids"])
        await engine.generate(trajectory)
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        return trajectory

    head = played(careful, Engine("one word"), time_limit_s=0.05).head
    assert (head.lost, len(head.lengths)) == ((), 1)


def test_an_episode_that_is_cancelled_from_outside_is_no_lost_sample() -> None:
    async def begun_and_cancelled() -> None:
        begun = asyncio.Event()

        async def waits(engine: TurnEngine, row: dict[str, Any]) -> Trajectory:
            begun.set()
            await asyncio.Event().wait()
            return engine.begin(row["prompt_ids"])

        group = EpisodeGroup("k", waits, {"prompt_ids": [5]}, encoder(), LIMITS, {"n": 1, "seed": 1}, 60.0)
        playing = asyncio.create_task(group._episode(0))
        await begun.wait()
        playing.cancel()
        await playing

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(begun_and_cancelled())


def test_tokens_and_rewards_may_be_of_any_librarys_types() -> None:
    for tokens in (np.array([40, 41]), torch.tensor([40, 41]), (40, 41)):
        [(ids, _)] = played(adds(tokens), Engine("one word")).completions()
        said = plain("one word")
        assert ids.tolist() == [*said, 40, 41, *said]
    for reward in (np.float32(0.5), torch.tensor(0.5), 0.5):
        assert played(rewards(reward), Engine("one word")).head.rewards == (0.5,)


def test_tokens_after_the_last_turn_are_dropped_however_many_they_are() -> None:
    async def floods(engine: TurnEngine, row: dict[str, Any]) -> Trajectory:
        trajectory = engine.begin(row["prompt_ids"])
        await engine.generate(trajectory)
        trajectory.add([5] * 1000)
        return trajectory

    [(ids, _)] = played(floods, Engine("one word")).completions()
    assert ids.tolist() == plain("one word")


def test_a_budget_smaller_than_a_sample_gives_each_sample_a_pass() -> None:
    record = played(calculator, Engine("<calc>12 * 7</calc>", "so 84.<|im_end|>"), samples=3)
    group = Group(0, record, record.head)
    group.take(RewardBatch([1.0, 2.0, 3.0], {"r": [1.0, 2.0, 3.0]}, {}), GrpoConfig())
    batch = make_batch([group], [], [0], 1, {}, [{"prompt": "", "answer": ""}])
    [share] = shares_of(batch, 1, GrpoConfig(group_size=3))
    [update] = mini_batches(share, {0: record})
    passes = list(micro_batches([update.samples], tokens=1))
    assert [[len(piece) for piece in each] for each in passes] == [[1]] * 3
    assert [piece[0] for [piece] in passes] == list(update.samples)


def test_advantages_use_the_remaining_samples() -> None:
    rewards = torch.tensor([1.0, 0.0, 3.0, 1.0, 2.0])
    found = group_advantages(rewards, [2, 3])
    torch.testing.assert_close(found, torch.cat([group_advantages(rewards[:2], 2), group_advantages(rewards[2:], 3)]))
    assert group_advantages(torch.zeros(0), []).tolist() == []


def test_episodes_continue_on_another_engine_from_the_lost_turn() -> None:
    dying, next_one = Engine("a <calc>1+1</calc>", "b", version=1, dies=3), Engine("a", "b<|im_end|>", version=2)
    engines = iter([dying, next_one])
    started: list[Engine] = []

    def start(_: int) -> Any:
        engine = next(engines)
        engine.start = Method(lambda: answered({"pid": 0}))
        engine.leave = Method(lambda: answered(None))
        started.append(engine)
        return engine

    calls: list[Engine] = []

    async def go() -> GroupHead:
        pool = EnginePool(start, 1, at_once=8, tolerance=1.0, time_limit_s=60)
        await pool.start()
        sampling = {"n": 2, "seed": 7, "stop": []}
        group = EpisodeGroup("k", calculator, {"prompt_ids": [5, 6, 7]}, encoder(), LIMITS, sampling, 5.0)
        playing = asyncio.create_task(group.play())

        async def head(engine: Engine) -> Any:
            calls.append(engine)
            group.move_to(engine)
            stranded = asyncio.create_task(group.stranded.wait())
            await asyncio.wait({playing, stranded}, return_when=asyncio.FIRST_COMPLETED)
            stranded.cancel()
            return playing.result().head if playing.done() else GroupHead(0, (), (), (), open=(0,))

        pool_patch = pytest.MonkeyPatch()
        pool_patch.setattr("lorapar_ray.grpo.engine_supervisor.leave", lambda engine: answered(None))
        try:
            return (await pool.episodes([5, 6, 7], lambda engine: (None, head(engine))))[1]
        finally:
            pool_patch.undo()
            for task in pool._watches:
                task.cancel()

    head = asyncio.run(go())
    assert calls == [dying, next_one] and head.turns == (2, 2) and head.lost == ()
    assert [ids[:3] for _, ids, _ in next_one.asked] == [[5, 6, 7]] * 2
    assert head.versions == (1, 1)  # of the first turn, which the bound on staleness uses
    assert {len(ids) for _, ids, _ in next_one.asked} == {3 + len(plain("a <calc>1+1</calc>")) + len(plain(" = 2\n"))}


def test_a_reply_continues_the_chat_as_the_template_would_have_written_it() -> None:
    tokenizer = encoder().tokenizer
    chat = [{"role": "user", "content": "Guess."}]
    prompt = encoder().prompt_ids(chat)
    whole = [*chat, {"role": "assistant", "content": "Seven"}, {"role": "user", "content": "No."}]
    expected = tokenizer.apply_chat_template(whole, tokenize=True, add_generation_prompt=True)["input_ids"]
    engine = TurnEngine(None, encoder(), Limits(64, 64, 49152))  # type: ignore[arg-type]
    for ending in ("", "<|im_end|>"):
        trajectory = engine.begin(prompt)
        said = plain("Seven" + ending)
        trajectory.take(said, [0.0] * len(said), Turn(said, True, 0))
        trajectory.add(engine.reply(trajectory, "No."))
        assert trajectory.ids == expected


def test_a_row_has_our_fields_and_the_datas_columns() -> None:
    question = {"prompt": "q", "answer": "4", "prompt_ids": [5], "columns": '{"answer": 4, "level": 2}'}
    assert row_of(question) == {
        "prompt": "q",
        "answer": "4",
        "prompt_ids": [5],
        "level": 2,
        "columns": {"answer": 4, "level": 2},
    }


def test_rewards_get_the_last_answer_and_the_whole_trajectory(monkeypatch: pytest.MonkeyPatch) -> None:
    record = played(calculator, Engine("It is <calc>12 * 7</calc>", "so 84.<|im_end|>"))
    monkeypatch.setattr(reading, "read_record", lambda reference: reference)
    row = {"prompt": "q", "answer": "84", "response": "84", "prompt_ids": [5, 6, 7]}
    plan = {
        "rows": [row],
        "steps": 1,
        "model": resolve_model("package:smollm2-135m-instruct"),
        "trust_remote_code": False,
    }
    answers = Reader(plan, GrpoConfig()).read(Request(0, record, 0))
    assert answers is not None and answers.completions == ["so 84."]
    [said] = answers.columns["trajectory"]
    assert said == [
        {"role": "assistant", "content": "It is <calc>12 * 7</calc>"},
        {"role": "environment", "content": " = 84\n"},
        {"role": "assistant", "content": "so 84."},
    ]
    [mask], [ids] = answers.columns["env_mask"], answers.columns["completion_ids"]
    assert len(mask) == len(ids) and sum(mask) == record.head.sampled[0]


def test_the_environments_own_reward_counts_by_its_weight_and_a_missing_one_is_counted() -> None:
    settings = GrpoConfig(
        environment="m:f", rewards=[{"name": "environment", "weight": 2.0}, {"name": "numeric_answer"}], group_size=3
    )
    head = GroupHead(3, (1, 1, 1), (True,) * 3, (0,) * 3, rewards=(1.0, None, 0.5), lost=("E: x",))

    class Rewards:
        async def score(self, index: int, record: Any, step: int) -> RewardBatch:
            return RewardBatch([0.0, 1.0, 1.0], {"numeric_answer": [0.0, 1.0, 1.0]}, {})

    rollouts = Rollouts(settings, {"rows": [], "steps": 1, "seed": 0}, [], None, Rewards())  # type: ignore[arg-type]
    group = Group(0, None, head)
    asyncio.run(rollouts.reward(group, 0))
    assert group.rewards == [2.0, 1.0, 2.0] and list(group.parts) == ["environment", "numeric_answer"]
    assert group.failed == {"environment": 1} and group.failures == 1 and group.solved == 0.5
    empty = Group(0, None, GroupHead(0, (), (), (), lost=("E: x",) * 3))
    asyncio.run(rollouts.reward(empty, 0))
    assert (empty.rewards, empty.spread, empty.solved) == ([], 0.0, 0.0)
    with pytest.raises(UserError, match=r"grpo.environment: all 3 episodes of step 1 are lost; one: E: x"):
        Failures().report([empty], 0)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("my_module", "is not module:function"),
        ("no_such_module:rollout", "no_such_module"),
        ("lorapar_ray.grpo.environments.calculator:calculate", "is not an async function"),
        ("tests.unit.test_environments:failed", "cannot be called with an engine and a row"),
    ],
)
def test_an_environment_that_cannot_be_used_is_named(name: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        get_environment(name)


def test_a_config_names_the_environment_that_its_reward_is_of() -> None:
    with pytest.raises(ValueError, match=r"grpo.environment gives its trajectories; name one there"):
        GrpoConfig(rewards=[{"name": "environment"}])


def test_a_module_that_sets_signal_handlers_is_imported_on_any_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sets_a_handler.py").write_text(
        "import signal\n"
        "usual = signal.signal(signal.SIGTERM, lambda *_: None)\n"
        "async def rollout(engine, row):\n    return usual\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    before, function = signal.getsignal(signal.SIGTERM), signal.signal
    with ThreadPoolExecutor(1) as thread:
        rollout: Any = thread.submit(get_environment, "sets_a_handler:rollout").result()
    assert asyncio.run(rollout(None, {})) == before == signal.getsignal(signal.SIGTERM)
    del sys.modules["sets_a_handler"]
    get_environment("sets_a_handler:rollout")
    assert before == signal.getsignal(signal.SIGTERM) and signal.signal is function
