"""Unmodified environments of the library `verifiers`: `MultiTurnEnv`, `ToolEnv`, `GymEnv` and their subclasses.

    # my_environments.py
    from lorapar_ray.grpo.environments.from_verifiers import from_verifiers
    rollout = from_verifiers("wordle")

    grpo: {environment: "my_environments:rollout", rewards: [{name: environment}]}

The environment calls an object with the interface of an OpenAI client; each call is a turn of `TurnEngine`. Only
messages that the environment has added since are tokenised, never the chat so far, so training uses exactly the sampled
tokens. An environment that changes earlier messages, or requests two answers to the same chat, fails with an error.

The environment's own `sampling_args` limit each answer (`max_tokens`, `stop`); the config alone sets the others, such
as the temperature.

Written for `verifiers` 0.1.10, the newest that is compatible with this project's versions. Also tried with 0.1.14,
which wraps the client in a class. The environments of 0.4 have another interface.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

from lorapar_ray.datasets.answers.pairs import pairs
from lorapar_ray.errors import UserError
from lorapar_ray.grpo.environments.episodes import RolloutFunction
from lorapar_ray.grpo.environments.trajectory import Trajectory
from lorapar_ray.grpo.environments.turns import TurnEngine
from lorapar_ray.interrupts import handlers_kept

MOST = ("max_completion_tokens", "max_tokens")
"""OpenAI's two names of the most tokens of an answer; the first counts."""
_CALL = re.compile(r"<tool_call>\s*+(?=\{)")
_CALL_END = re.compile(r"(?<=\})\s*+</tool_call>")


def from_verifiers(
    environment: str | Callable[..., Any], *, turn_tokens: int | None = None, **arguments: Any
) -> RolloutFunction:
    """An environment of `verifiers` as a rollout function.

    Args:
        environment: the name of an installed one (`verifiers.load_environment`), or a function that creates one.
        turn_tokens: most tokens of one answer; None: what the environment's `sampling_args` say, else all that are
            left of `grpo.max_completion_length`, so that one long answer ends the episode.
        arguments: passed to either.

    Raises:
        UserError: `verifiers` is not installed.
    """
    made = load(environment, **arguments)

    async def rollout(engine: TurnEngine, row: dict[str, Any]) -> Trajectory:
        return await play(made, engine, row, turn_tokens)

    return rollout


def load(environment: str | Callable[..., Any], **arguments: Any) -> Any:
    """The environment.

    Raises:
        UserError: `verifiers` is not installed.
    """
    try:
        import verifiers
    except ImportError as error:
        raise UserError(f"this environment needs verifiers ({error}): pip install 'lorapar-ray[verifiers]'") from error
    with handlers_kept():  # also if an episode is the first to load it
        if isinstance(environment, str):
            return verifiers.load_environment(environment, **arguments)
        return environment(**arguments)


def rows(environment: Any) -> Iterator[dict[str, Any]]:
    """The environment's training questions; write them to a file for `data.train`.

    Each has `prompt` (messages), `answer`, and `task` and `info` if the environment has them.
    """
    for row in environment.get_dataset():
        kept = {name: row[name] for name in ("prompt", "answer", "task", "info") if row.get(name) is not None}
        yield {**kept, "answer": str(row.get("answer", ""))}


async def play(
    environment: Any, engine: TurnEngine, row: Mapping[str, Any], turn_tokens: int | None = None
) -> Trajectory:
    """One episode, with the reward of the environment's rubric; `turn_tokens`: see `from_verifiers`."""
    import verifiers

    model, columns = Model(engine), row.get("columns") or {}
    asked: dict[str, Any] = {
        "prompt": list(row.get("messages") or [{"role": "user", "content": row["prompt"]}]),
        "answer": row.get("answer", ""),
        "info": columns.get("info") or {},
        "example_id": 0,
        **({"task": columns["task"]} if columns.get("task") else {}),
    }
    client: Any = model
    if hasattr(verifiers, "OpenAIChatCompletionsClient"):
        client = verifiers.OpenAIChatCompletionsClient(model)
    sampling = deepcopy(getattr(environment, "sampling_args", None) or {})  # which `rollout` alone would not use
    if turn_tokens is not None:
        sampling = {name: value for name, value in sampling.items() if name not in MOST} | {MOST[0]: turn_tokens}
    state = await environment.rollout(asked, client, "policy", sampling)
    if model.failure is not None:
        raise model.failure
    if model.trajectory is None:
        raise ValueError(f"the environment never asked the policy: {state.get('error')!r}")
    await environment.rubric.score_rollout(state)
    model.trajectory.reward = state["reward"]
    return model.trajectory


class Model:
    """Replaces `openai.AsyncOpenAI` for an environment; it has only `chat.completions.create`."""

    def __init__(self, engine: TurnEngine) -> None:
        self._engine = engine
        self.chat = self.completions = self  # client.chat.completions.create
        self.trajectory: Trajectory | None = None
        self.failure: Exception | None = None
        """The error that ends the episode; environments catch exceptions and continue."""
        self._messages: list[Any] = []
        """The chat that the trajectory contains."""

    async def create(
        self, *, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None, **options: Any
    ) -> Any:
        """The policy's answer as an OpenAI `ChatCompletion`.

        Raises:
            openai.BadRequestError: the chat leaves no room for an answer; environments then end the episode.
        """
        chat = [dict(each) for each in messages]
        most = next((options[name] for name in MOST if options.get(name)), None)
        try:
            trajectory = self._continued(chat, list(tools or []))
        except Exception as error:
            self.failure = error
            raise
        if not trajectory.room:
            raise _too_long()
        turn = await self._engine.generate(trajectory, max_tokens=most, stop=_listed(options.get("stop")))
        text = self._engine.decode(turn.token_ids)
        calls = tool_calls(text) if tools else []
        self._messages = [*chat, None]
        return _completion(text, calls, finished=turn.finished)

    def _continued(self, chat: list[dict[str, Any]], tools: list[Any]) -> Trajectory:
        """The trajectory, extended by the chat's new messages."""
        template = {"tools": tools} if tools else {}
        if self.trajectory is None:
            ids = self._engine.tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, return_dict=False, **template
            )
            self.trajectory = self._engine.begin(ids)
            return self.trajectory
        known = len(self._messages)
        same = all(old is None or old == new for old, new in zip(self._messages, chat, strict=False))
        if len(chat) <= known or not same or chat[known - 1]["role"] != "assistant":
            raise ValueError("the environment changes earlier messages, so its turns are not one trajectory")
        self.trajectory.add(self._engine.reply(self.trajectory, chat[known:], **template))
        return self.trajectory


def tool_calls(text: str) -> list[dict[str, str]]:
    """Name and arguments (JSON) of the calls in an answer, written as `<tool_call>{"name": …, "arguments": …}`; text
    that is not a JSON object with a name is ignored."""
    found = []
    for opened, closed in pairs(text, _CALL, _CALL_END):
        try:
            call = json.loads(text[opened.end() : closed.start()])
        except ValueError:
            continue
        if isinstance(call.get("name"), str):
            found.append({"name": call["name"], "arguments": json.dumps(call.get("arguments", {}))})
    return found


def _without_calls(text: str) -> str:
    ends = [0, *(end for opened, closed in pairs(text, _CALL, _CALL_END) for end in (opened.start(), closed.end()))]
    return "".join(text[start:end] for start, end in zip(ends[::2], [*ends[1::2], len(text)], strict=True))


def _completion(text: str, calls: Sequence[Mapping[str, str]], *, finished: bool) -> Any:
    from openai.types.chat import ChatCompletion

    reason = "tool_calls" if calls else "stop" if finished else "length"
    message: dict[str, Any] = {"role": "assistant", "content": _without_calls(text) if calls else text or " "}
    if calls:
        message["tool_calls"] = [
            {"id": f"call_{uuid.uuid4().hex[:8]}", "type": "function", "function": dict(call)} for call in calls
        ]
    return ChatCompletion.model_validate(
        {
            "id": uuid.uuid4().hex,
            "object": "chat.completion",
            "created": 0,
            "model": "policy",
            "choices": [{"index": 0, "finish_reason": reason, "message": message, "logprobs": None}],
        }
    )


def _too_long() -> Exception:
    """An OpenAI server's error for a full context; `verifiers` ends the episode on it."""
    import httpx
    from openai import BadRequestError

    said = "this model's maximum context length is reached: grpo.max_completion_length"
    answer: Any = httpx.Response(400, text=said, request=httpx.Request("POST", "http://policy"))
    return BadRequestError(said, response=answer, body=None)


def _listed(stop: Any) -> list[str]:
    return [] if stop is None else [stop] if isinstance(stop, str) else list(stop)
