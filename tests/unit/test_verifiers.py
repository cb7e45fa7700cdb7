"""Environments of the library `verifiers`, played through our engine's turns; the engine is a fake with fixed
answers."""

import json
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from lorapar_ray.grpo.environments.from_verifiers import from_verifiers, load, rows, tool_calls
from lorapar_ray.grpo.environments.trajectory import Limits
from tests.unit.faked_engine import Engine, encoder, plain, played

LONG = Limits(prompt=512, completion=512, vocabulary=49152)


class Guessing:
    """A game with gym's methods: it ends with the right number."""

    def reset(self, seed: int) -> str:
        self.number = 2 + seed
        return "Guess a number."

    def step(self, action: str) -> tuple[str, float, bool, dict[str, Any]]:
        right = action.strip() == str(self.number)
        return "Yes." if right else "No.", float(right), right, {}


def gym(**changed: Any) -> Any:
    from verifiers.envs.experimental.gym_env import GymEnv

    return GymEnv(Guessing, num_train_episodes=2, num_eval_episodes=1, **changed)


def test_its_own_gym_environment_plays_three_turns_and_every_token_is_as_it_was_sampled() -> None:
    engine = Engine("1<|im_end|>", "2<|im_end|>", "3<|im_end|>")
    row = next(rows(load(gym)))
    assert row["prompt"][-1]["content"] == "Guess a number."
    record = played(from_verifiers(gym), engine, limits=LONG, row={**row, "messages": row["prompt"], "prompt": "Guess"})
    [(ids, _)], [mask], head = record.completions(), record.masks(), record.head
    assert (head.turns, head.rewards, head.lost) == ((3,), (1.0,), ())
    assert mask is not None and ids[mask].tolist() == [
        *plain("1<|im_end|>"),
        *plain("2<|im_end|>"),
        *plain("3<|im_end|>"),
    ]
    chat = [{"role": "user", "content": "Guess a number."}]
    for said, told in (("1", "No."), ("2", "Yes.\nEpisode already ended.")):
        chat += [{"role": "assistant", "content": said}, {"role": "user", "content": told}]
    written = encoder().tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert [*record.prompt_ids, *ids] == [*written, *plain("3<|im_end|>")]
    assert engine.asked[2][1] == written


def test_its_tool_environment_calls_tools_and_an_episode_without_room_ends() -> None:
    from verifiers import Rubric, ToolEnv

    called: list[tuple[int, int]] = []

    def times(a: int, b: int) -> int:
        """Multiply.

        Args:
            a: one
            b: the other
        """
        called.append((a, b))
        return a * b

    def environment() -> Any:
        from datasets import Dataset

        data = Dataset.from_list([{"question": "What is 12 * 7?", "answer": "84"}])
        return ToolEnv(tools=[times], dataset=data, rubric=Rubric(funcs=[right]), max_turns=5)

    async def right(completion: Any, answer: str) -> float:
        return float(answer in completion[-1]["content"])

    call = f"<tool_call>{json.dumps({'name': 'times', 'arguments': {'a': 12, 'b': 7}})}</tool_call><|im_end|>"
    row = {"prompt": "What is 12 * 7?", "answer": "84", "prompt_ids": [5]}
    record = played(from_verifiers(environment), Engine(call, call, "It is 84.<|im_end|>"), limits=LONG, row=row)
    assert called == [(12, 7)] * 2 and (record.head.turns, record.head.rewards) == ((3,), (1.0,))
    [(ids, _)], [mask] = record.completions(), record.masks()
    assert "84" in encoder().tokenizer.decode(ids[~mask])  # type: ignore[operator]
    short = Limits(prompt=512, completion=len(plain(call)) + 1, vocabulary=49152)
    cut = played(from_verifiers(environment), Engine(call), limits=short, row=row).head
    assert (cut.turns, cut.lost, cut.sampled) == ((1,), (), (len(plain(call)),))


def test_an_answer_has_at_most_the_environments_tokens_or_ours() -> None:
    def environment(**limits: Any) -> Any:
        made = gym(max_episode_steps=2)
        made.sampling_args |= limits
        return made

    row = {"prompt": "Guess a number.", "answer": "0", "prompt_ids": [5]}
    for limits, ours, most in (({}, None, None), ({"max_tokens": 5}, None, 5), ({"max_tokens": 5}, 3, 3)):
        engine = Engine("1<|im_end|>")
        made = from_verifiers(environment, turn_tokens=ours, **limits)
        played(made, engine, limits=LONG, row=row)
        asked = [sampling["max_tokens"] for _, _, sampling in engine.asked]
        assert len(asked) == 2 and (asked == [most] * 2 if most else min(asked) > LONG.completion // 2)


def test_it_can_be_loaded_on_any_thread_and_leaves_our_signal_handlers() -> None:
    """Its environments set handlers of SIGINT and SIGTERM; workers import them outside of the main thread."""
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    load(gym)
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(load, gym).result().num_train_episodes == 2
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_changed_history_is_refused() -> None:
    def environment() -> Any:
        from verifiers.envs.experimental.gym_env import GymEnv

        class Forgetful(GymEnv):
            async def get_prompt_messages(self, state: Any) -> Any:
                return [*(await super().get_prompt_messages(state))[-1:]]

        return Forgetful(Guessing, num_train_episodes=1, num_eval_episodes=1)

    row = {"prompt": "Guess a number.", "answer": "0", "prompt_ids": [5]}
    [lost] = played(from_verifiers(environment), Engine("1<|im_end|>"), limits=LONG, row=row).head.lost
    assert "changes earlier messages" in lost


def test_text_that_is_not_a_call_is_ignored() -> None:
    assert (
        tool_calls('<tool_call>{"name": 1}</tool_call> <tool_call>{x}</tool_call> <tool_call>{"a": 1}</tool_call>')
        == []
    )
