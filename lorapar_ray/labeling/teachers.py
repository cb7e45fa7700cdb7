"""Who votes: models hosted on Ray Serve with a real engine, and OpenAI-compatible endpoints elsewhere.

Both answer `ask(prompt, choices)` with the log-probability of each choice.
"""

from __future__ import annotations

import asyncio
import math
import os
from typing import Any

from lorapar_ray.config import TeacherConfig
from lorapar_ray.engines.settings import engine_arguments, engine_environment, platform_arguments
from lorapar_ray.errors import UserError
from lorapar_ray.models import resolve_model

RETRY_STATUS = (408, 409, 429, 500, 502, 503, 504)


class HostedTeacher:
    """A Serve replica around one vLLM engine. Only the choice is decoded: one token per vote."""

    def __init__(self, teacher: dict[str, Any], seed: int) -> None:
        from transformers import AutoTokenizer
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self._config = TeacherConfig.model_validate(teacher)
        model = resolve_model(self._config.model)
        self._tokenizer = AutoTokenizer.from_pretrained(model)
        arguments = engine_arguments(model, self._config.engine, seed=seed, trust_remote_code=False)
        self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**{**platform_arguments(), **arguments}))
        self._asked = 0

    async def ask(self, prompt: str, choices: list[str]) -> list[float]:
        """Log-probabilities of the choices as the next token, normalised over the choices."""
        from vllm import SamplingParams

        from lorapar_ray.labeling.prompts import with_template

        text = with_template(prompt, self._tokenizer, self._config.use_chat_template)
        if self._config.thinking_tokens:
            text = await self._think(text)
        prompt_ids, choice_ids = choice_tokens(self._tokenizer, text, choices)
        params = SamplingParams(max_tokens=1, temperature=1.0, allowed_token_ids=choice_ids, logprobs=len(choice_ids))
        output = await self._run({"prompt_token_ids": prompt_ids}, params)
        table = output.outputs[0].logprobs[0]
        return [table[token].logprob if token in table else -math.inf for token in choice_ids]

    async def _think(self, text: str) -> str:
        """Let a reasoning model write first; the choice is asked for after what it wrote."""
        from vllm import SamplingParams

        opened = text.removesuffix("System:")
        params = SamplingParams(max_tokens=self._config.thinking_tokens, temperature=0.6, seed=0)
        output = await self._run({"prompt": opened}, params)
        return f"{opened}{output.outputs[0].text}\nSystem:"

    async def _run(self, prompt: dict[str, Any], params: Any) -> Any:
        from vllm.v1.engine.exceptions import EngineDeadError

        self._asked += 1
        last = None
        try:
            async for output in self._engine.generate(prompt, params, request_id=str(self._asked)):
                last = output
        except EngineDeadError:
            os._exit(1)  # Serve replaces a dead replica; one with a dead engine would fail every request
        return last


def choice_tokens(tokenizer: Any, text: str, choices: list[str]) -> tuple[list[int], list[int]]:
    """(ids of `text` and whatever all choices begin with, the one token by which each choice differs).

    Raises:
        UserError: some choice is more than one token for this tokenizer.
    """
    plain = not text.startswith(tokenizer.bos_token or "\0")
    encoded = [tokenizer(f"{text} {choice}", add_special_tokens=plain)["input_ids"] for choice in choices]
    prefix = encoded[0][:-1]
    if any(ids[:-1] != prefix for ids in encoded) or len({ids[-1] for ids in encoded}) != len(choices):
        raise UserError(f"label.definitions: the choices {', '.join(choices)} are not one token each for a teacher")
    return prefix, [ids[-1] for ids in encoded]


def target(teacher: TeacherConfig, app: str, seed: int) -> Any:
    """What `serve.run_many` should run for a hosted teacher."""
    from ray import serve

    scaling: dict[str, Any] = {"num_replicas": teacher.replicas}
    if teacher.max_replicas is not None:
        bounds = {"min_replicas": teacher.replicas, "max_replicas": teacher.max_replicas}
        scaling = {"autoscaling_config": {**bounds, "target_ongoing_requests": teacher.max_ongoing_requests / 2}}
    deployment = serve.deployment(HostedTeacher).options(
        name=teacher.name,
        max_ongoing_requests=teacher.max_ongoing_requests,
        ray_actor_options={
            "num_cpus": teacher.resources.cpus,
            "num_gpus": teacher.resources.gpus,
            "runtime_env": {"env_vars": engine_environment(teacher.engine, teacher.resources)},
        },
        health_check_timeout_s=120,
        **scaling,
    )
    return serve.RunTarget(deployment.bind(teacher.model_dump(mode="json"), seed), name=app, route_prefix=None)


class RemoteTeacher:
    """An OpenAI-compatible completions endpoint, asked no faster than its rate limit."""

    def __init__(self, teacher: TeacherConfig) -> None:
        import httpx

        key = os.environ.get(teacher.api_key_env) if teacher.api_key_env else None
        if teacher.api_key_env and not key:
            raise UserError(f"teacher '{teacher.name}': environment variable {teacher.api_key_env} is not set")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.AsyncClient(base_url=str(teacher.base_url), headers=headers, timeout=None)
        self._model = teacher.model
        self._gap_s = 1 / teacher.requests_per_second if teacher.requests_per_second else 0.0
        self._free_at = 0.0

    async def ask(self, prompt: str, choices: list[str]) -> list[float]:
        """Log-probabilities of the choices among the endpoint's top alternatives for the next token.

        Raises:
            ConnectionError: a status worth trying again.
            ValueError: an answer in which no choice can be found.
        """
        await self._wait_for_turn()
        body = {"model": self._model, "prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": 5}
        response = await self._client.post("/completions", json=body)
        if response.status_code in RETRY_STATUS:
            raise ConnectionError(f"status {response.status_code}")
        response.raise_for_status()
        alternatives = response.json()["choices"][0]["logprobs"]["top_logprobs"][0]
        found = {token.strip(): value for token, value in alternatives.items()}
        if not any(choice in found for choice in choices):
            raise ValueError("no choice among the alternatives")
        floor = min(found.values()) - 1.0  # a choice outside the top alternatives is less likely than all of them
        return [found.get(choice, floor) for choice in choices]

    async def _wait_for_turn(self) -> None:
        now = asyncio.get_running_loop().time()
        self._free_at = max(self._free_at, now) + self._gap_s
        await asyncio.sleep(max(0.0, self._free_at - self._gap_s - now))
