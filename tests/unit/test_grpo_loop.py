"""The sampling half of stage 2's loop: which groups make a step's batch, and with which advantages."""

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import OwnerDiedError

from lorapar_ray.config import GrpoConfig
from lorapar_ray.engines.completion import Completion
from lorapar_ray.engines.record import record_of
from lorapar_ray.errors import UserError
from lorapar_ray.grpo import loop
from lorapar_ray.grpo.asking import answer_from
from lorapar_ray.grpo.batches import Batch, Share, mini_batches, shares_of
from lorapar_ray.grpo.failures import Failures
from lorapar_ray.grpo.fetching import fetch
from lorapar_ray.grpo.groups import Group
from lorapar_ray.grpo.journal import Journal
from lorapar_ray.grpo.loop import collect, learn
from lorapar_ray.grpo.prompt_stream import PromptStream
from lorapar_ray.grpo.rewards import RewardBatch
from lorapar_ray.grpo.rewards.actor import RecordLost
from lorapar_ray.grpo.rollouts import Rollouts
from lorapar_ray.grpo.samples import Sample

REWARDS = {0: [1.0, 1.0], 1: [1.0, 0.0], 2: [0.0, 0.0], 3: [0.0, 1.0]}


ROWS = [{"prompt": f"q{index}", "answer": "1"} for index in range(4)]


class ScriptedRollouts(Rollouts):
    """A fake: REWARDS has the rewards of prompt k's completions; it records the requests."""

    def __init__(self, loses: int | None) -> None:
        """`loses`: a prompt whose first record is lost before it is rewarded."""
        self.loses, self.lost = loses, 0
        self.asked: list[tuple[int, int]] = []

    async def sample(self, index: int, step: int, attempt: int) -> Group:
        self.asked.append((index, attempt))
        record = record_of([index], [Completion([5, 6], [-1.0, -1.0], True, step) for _ in range(2)])
        return Group(index, record, record.head)

    async def reward(self, group: Group, step: int) -> None:
        if group.index == self.loses:
            self.loses = None
            raise RecordLost
        rewards = REWARDS[group.index]
        group.take(RewardBatch(rewards, {"r": list(rewards)}, {}), GrpoConfig())


class Reports(Failures):
    """Notes how many groups it was told of."""

    reported = 0

    def report(self, groups: Sequence[Group], step: int) -> None:
        self.reported = len(groups)


def collected(refills: int, loses: int | None = None) -> tuple[Batch, list[Sample], ScriptedRollouts, list[int]]:
    rollouts, drawn, failures = ScriptedRollouts(loses), list[int](), Reports()
    stream = PromptStream(4, seed=0, order=[0, 1, 2, 3])
    stream.returned = [0, 1, 2, 3]
    config = GrpoConfig(group_size=2, prompts_per_step=2)
    made = collect(4, 2, refills, drawn=drawn, stream=stream, sampler=rollouts, failures=failures, rows=ROWS)  # type: ignore[arg-type]
    batch = asyncio.run(made)
    assert failures.reported == len(drawn)
    [share] = shares_of(batch, 1, config)
    [update] = mini_batches(share, {number: group.record for number, group in enumerate(batch.groups)})
    assert (update.count, update.tokens, share.tokens) == (len(update.samples), 2 * update.count, update.tokens)
    return batch, sorted(update.samples, key=lambda sample: sample.prompt_ids[0]), rollouts, drawn


def test_groups_with_equal_rewards_are_replaced_and_advantages_follow_the_rewards() -> None:
    batch, samples, rollouts, drawn = collected(refills=2)
    assert rollouts.asked == [(0, 0), (1, 0), (2, 1), (3, 2)] and drawn == [0, 1, 2, 3]
    assert [sample.prompt_ids.tolist() for sample in samples] == [[1], [1], [3], [3]]
    signs = [sample.advantage > 0 for sample in samples]
    assert signs == [True, False, False, True] and sum(each.advantage for each in samples) == pytest.approx(0)
    assert batch.prompts == [0, 1, 2, 3]
    assert batch.metrics["reward"] == 0.5 and batch.metrics["zero_variance_share"] == 0.5
    assert [(example.prompt, example.completion) for example in batch.examples] == [("q1", 0), ("q3", 1)]


def test_without_refills_a_step_trains_on_what_there_is() -> None:
    _, samples, _, drawn = collected(refills=0)
    assert drawn == [0, 1] and [sample.prompt_ids.tolist() for sample in samples] == [[1], [1]]


def test_a_group_whose_record_is_lost_is_sampled_again_with_the_same_prompt() -> None:
    _, samples, rollouts, drawn = collected(refills=0, loses=1)
    assert rollouts.asked == [(0, 0), (1, 0), (1, 0)] and rollouts.lost == 1
    assert drawn == [0, 1] and [sample.prompt_ids.tolist() for sample in samples] == [[1], [1]]


def test_waiting_for_the_coordinator_sends_pings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only sending data reveals that a network cut has broken a connection."""
    pings: list[str] = []
    coordinator = SimpleNamespace(ping=SimpleNamespace(remote=lambda: pings.append("ping")))
    monkeypatch.setattr(ray, "wait", lambda references, timeout: (references, []) if len(pings) == 2 else ([], []))
    monkeypatch.setattr(ray, "get", lambda reference: f"result of {reference}")
    assert answer_from(coordinator, "the call") == "result of the call"
    assert pings == ["ping", "ping"]


def test_a_learner_reports_lost_records_and_uses_their_replacements(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """References are the records themselves; None is a lost one."""

    def get(reference: Any) -> Any:
        if isinstance(reference, list):
            return [get(each) for each in reference]
        if reference is None:
            raise OwnerDiedError("00", None, "")
        return reference

    batch, _, _, _ = collected(refills=2)
    config = GrpoConfig(group_size=2, prompts_per_step=2)
    [whole] = shares_of(batch, 1, config)
    batch.groups[1].record = None
    [damaged] = shares_of(batch, 1, config)
    told: list[tuple[int, list[int]]] = []

    shares = SimpleNamespace(remote=lambda step, rank, world, packed: whole if told else damaged)
    losses = SimpleNamespace(remote=lambda step, groups: told.append((step, groups)) or "done")
    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "wait", lambda references, timeout: (references, []))
    coordinator = SimpleNamespace(batch=shares, lost=losses)
    share, [update] = fetch(coordinator, 4, 0, 1)
    assert told == [(4, [1])] and share is whole
    assert sorted(sample.prompt_ids.tolist()[0] for sample in update.samples) == [1, 1, 3, 3]


PROOF_S = 0.2


class SlowPublisher:
    """A fake: it waits `PROOF_S` for the engines' proof, without engines."""

    def __init__(self, *_: object) -> None:
        self.figures: dict[str, float] = {}

    def publish(self, *_: object) -> None: ...

    def wait(self) -> None:
        start = time.monotonic()
        time.sleep(PROOF_S)
        self.figures = {"seconds/wait_for_proof": time.monotonic() - start}


class Learner:
    """A fake of a learner with one arm, which trains in no time."""

    def __init__(self) -> None:
        self.arms = [
            SimpleNamespace(
                steps=2,
                settings=GrpoConfig(canary_tolerance=0.1, checkpoint_every=5),
                restore=lambda rank, world: (0, None),
                policy=lambda step: None,
                require_finite=lambda: None,
            )
        ]
        self.forward = SimpleNamespace(together=False, packed=True)
        self.finish = self.rounding = lambda arm: None

    def canaries(self) -> list[list[Any]]:
        return [[]]

    def step(
        self, batches: Any, steps: Any, world: int, before_update: Callable[[int], None]
    ) -> dict[int, dict[str, float]]:
        before_update(0)
        return {0: {}}


def test_a_learner_that_waits_for_the_proof_of_its_policy_is_idle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "Publisher", SlowPublisher)
    monkeypatch.setattr(loop, "fetch", lambda *_, **__: (Share([], 1), []))
    monkeypatch.setattr(loop.Lead, "begin", lambda *_: None)
    metrics = tmp_path / "grpo.jsonl"
    journal = Journal(metrics, tmp_path / "samples.jsonl", [], "run", lambda ids, whole: "")
    learn(Learner(), [None], [journal], 0, 1)  # type: ignore[arg-type]
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert len(lines) == 2
    for line in lines:
        waited = line["seconds/wait"] + line["seconds/wait_for_proof"]
        assert waited >= PROOF_S and line["idle/learner"] == pytest.approx(waited / line["seconds"])


def test_the_step_at_which_training_stops_is_written_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "Publisher", SlowPublisher)
    monkeypatch.setattr(loop, "fetch", lambda *_, **__: (Share([], 1), []))
    monkeypatch.setattr(loop.Lead, "begin", lambda *_: None)
    learner, metrics = Learner(), tmp_path / "grpo.jsonl"

    def stop() -> None:
        raise UserError("its updates are not finite")

    learner.arms[0].require_finite = stop
    journal = Journal(metrics, tmp_path / "samples.jsonl", [], "run", lambda ids, whole: "")
    with pytest.raises(UserError, match="not finite"):
        learn(learner, [None], [journal], 0, 1)  # type: ignore[arg-type]
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [1]
