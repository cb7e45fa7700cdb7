"""A teacher on Ray Serve: one replica around one vLLM engine.

Why not `ray.serve.llm`: its `LLMServer` speaks the OpenAI protocol, so every vote would be parsed from a request model,
detokenised and written into a response with log-probabilities keyed by token text, where `1` and ` 1` collide. Here a
vote is one constrained token and comes back as the log-probabilities of exactly the K choice tokens. Placement,
autoscaling and limits are Serve's own in both cases. `jobs/benchmarks/labeling.py` compares both.
"""

from __future__ import annotations

import math
import os
from typing import Any

from lorapar_ray.config import TeacherConfig
from lorapar_ray.engines.phases import Phases
from lorapar_ray.engines.processes import start_async_llm
from lorapar_ray.engines.settings import engine_arguments, engine_environment, memory_share
from lorapar_ray.errors import UserError
from lorapar_ray.labeling.prompts import with_template, with_thought
from lorapar_ray.models import model_reference, resolve_model
from lorapar_ray.workers import ray_options

ROOM_FOR_CHOICE = 16
"""Tokens reserved after a thought for the words that ask for the choice."""


class HostedTeacher:
    """A Serve replica around one vLLM engine. Only the choice is decoded: one token per vote."""

    def __init__(self, teacher: dict[str, Any], choice: str, seed: int) -> None:
        """Start the engine; `choice` are the last words of every prompt (`label.prompt.choice`)."""
        self._config = TeacherConfig.model_validate(teacher)
        self._choice = choice
        phases = Phases(f"teacher {self._config.name}")
        where = f"label.teachers '{self._config.name}': engine"
        self._engine = start_async_llm(teacher_engine_arguments(self._config, seed), phases, where)
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(
            resolve_model(self._config.model), revision=self._config.revision
        )
        self._choice_ids: dict[str, list[int]] = {}
        self._asked = 0

    async def ask(
        self, prompt: str, choices: list[str], use_chat_template: bool | None, thinking_tokens: int
    ) -> tuple[list[float], int]:
        """(log-probabilities of the choices as the next token, tokens read and written).

        Args:
            use_chat_template, thinking_tokens: of the teacher that asks, which may be another than the engine's.
        """
        from vllm import SamplingParams

        text = with_template(prompt, self._tokenizer, use_chat_template, self._choice)
        thought = 0
        if thinking_tokens:
            text, thought = await self._think(text, thinking_tokens)
        prompt_ids, choice_ids = self._tokens(text, choices)
        params = SamplingParams(max_tokens=1, temperature=1.0, allowed_token_ids=choice_ids, logprobs=len(choice_ids))
        output = await self._run({"prompt_token_ids": prompt_ids}, params)
        table = output.outputs[0].logprobs[0]
        log_probs = [table[token].logprob if token in table else -math.inf for token in choice_ids]
        return log_probs, len(prompt_ids) + 1 + thought

    async def check_health(self) -> None:
        """Called regularly by Serve: an idle replica with a dead engine is replaced before the next request."""
        await self._engine.check_health()

    def _tokens(self, text: str, choices: list[str]) -> tuple[list[int], list[int]]:
        """As `choice_tokens`, with only one tokenisation if the choices are already known."""
        key = "\0".join(choices)
        if key in self._choice_ids:
            ids = self._tokenizer(f"{text} {choices[0]}", add_special_tokens=self._needs_bos(text))["input_ids"]
            if ids[-1] == self._choice_ids[key][0]:
                return ids[:-1], self._choice_ids[key]
        prompt_ids, self._choice_ids[key] = choice_tokens(self._tokenizer, text, choices)
        return prompt_ids, self._choice_ids[key]

    async def _think(self, text: str, most: int) -> tuple[str, int]:
        """Let a reasoning model write first; the choice is asked after its text. (text, tokens)"""
        from vllm import SamplingParams

        opened = text.removesuffix(self._choice)
        prompt_ids = self._tokenizer(opened, add_special_tokens=self._needs_bos(opened))["input_ids"]
        room = self._config.engine.max_model_len - len(prompt_ids) - ROOM_FOR_CHOICE
        tokens = max(1, min(most, room))
        output = await self._run(
            {"prompt_token_ids": prompt_ids}, SamplingParams(max_tokens=tokens, temperature=0.6, seed=0)
        )
        written = output.outputs[0]
        return with_thought(opened, written.text, self._choice), len(prompt_ids) + len(written.token_ids)

    def _needs_bos(self, text: str) -> bool:
        """Whether the tokenizer should add its special tokens: a chat template has written its own."""
        return not text.startswith(self._tokenizer.bos_token or "\0")

    async def _run(self, prompt: dict[str, Any], params: Any) -> Any:
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError

        params.output_kind = RequestOutputKind.FINAL_ONLY
        self._asked += 1
        last = None
        try:
            async for output in self._engine.generate(prompt, params, request_id=str(self._asked)):
                last = output
        except EngineDeadError:
            os._exit(1)  # Serve replaces a dead replica; one with a dead engine would fail every request
        return last


def choice_tokens(tokenizer: Any, text: str, choices: list[str]) -> tuple[list[int], list[int]]:
    """(ids of `text` and the choices' common beginning, the one token by which each choice differs).

    Raises:
        UserError: a choice is more than one token for this tokenizer.
    """
    plain = not text.startswith(tokenizer.bos_token or "\0")
    encoded = [tokenizer(f"{text} {choice}", add_special_tokens=plain)["input_ids"] for choice in choices]
    prefix = encoded[0][:-1]
    if any(ids[:-1] != prefix for ids in encoded) or len({ids[-1] for ids in encoded}) != len(choices):
        raise UserError(f"label.definitions: the choices {', '.join(choices)} are not one token each for a teacher")
    return prefix, [ids[-1] for ids in encoded]


def teacher_engine_arguments(teacher: TeacherConfig, seed: int) -> dict[str, Any]:
    """Keyword arguments of the teacher's `vllm.AsyncEngineArgs`; teachers that share a GPU fill their part of it."""
    own = {"revision": teacher.revision, "tokenizer_revision": teacher.revision} if teacher.revision else {}
    arguments = engine_arguments(resolve_model(teacher.model), teacher.engine, seed=seed, trust_remote_code=False)
    return memory_share(teacher.resources) | own | arguments


def deployment_options(teacher: TeacherConfig) -> dict[str, Any]:
    """Serve's options: number of replicas, their resources, and their in-flight cap."""
    scaling: dict[str, Any] = {"num_replicas": teacher.replicas}
    if teacher.max_replicas is not None:
        full = min(teacher.engine.max_num_seqs, teacher.ongoing_requests)
        bounds = {"min_replicas": teacher.replicas, "max_replicas": teacher.max_replicas}
        scaling = {"autoscaling_config": {**bounds, "target_ongoing_requests": full}}
    return {
        "name": teacher.name,
        "max_ongoing_requests": teacher.ongoing_requests,
        "ray_actor_options": {
            **ray_options(teacher.resources),
            "runtime_env": {"env_vars": engine_environment(teacher.engine, teacher.resources)},
        },
        "health_check_timeout_s": 120,
        **scaling,
    }


def target(teacher: TeacherConfig, app: str, choice: str, seed: int) -> Any:
    """The target for `serve.run_many` of a hosted teacher."""
    from ray import serve

    deployment = serve.deployment(HostedTeacher).options(**deployment_options(teacher))
    fields = {**teacher.model_dump(mode="json"), "model": model_reference(teacher.model)}
    return serve.RunTarget(deployment.bind(fields, choice, seed), name=app, route_prefix=None)
