"""What a trajectory holds: tokens as they were sampled, an environment's tokens marked, within the limits."""

from typing import Any

import numpy as np
import torch

from lorapar_ray.grpo.environments import Trajectory, Turn, TurnEngine
from lorapar_ray.grpo.environments.calculator import rollout as calculator
from lorapar_ray.grpo.environments.trajectory import Limits
from tests.unit.faked_engine import Engine, adds, encoder, plain, played, rewards


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
