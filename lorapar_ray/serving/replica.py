"""A Serve replica: one vLLM engine with all of the run's adapters, behind vLLM's OpenAI handlers.

It has only three routes: vLLM's server has many more, some of which change the server.
"""

from __future__ import annotations

import asyncio
import atexit
import math
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from ray import serve

from lorapar_ray.config import Config
from lorapar_ray.datasets.chat import load_encoder
from lorapar_ray.engines.mismatch import PolicyMismatch, verified
from lorapar_ray.engines.phases import Phases
from lorapar_ray.engines.processes import start_async_llm
from lorapar_ray.engines.settings import LOADER, engine_arguments, lora_arguments, memory_share
from lorapar_ray.errors import UserError
from lorapar_ray.labeling.hosted import choice_tokens
from lorapar_ray.labeling.prompts import with_template
from lorapar_ray.models import resolve_model
from lorapar_ray.private_directory import private_directory
from lorapar_ray.serving.neutral import write_neutral
from lorapar_ray.serving.openai_side import BASE, openai_state
from lorapar_ray.serving.requests import (
    AUTO,
    BadRequest,
    body_of,
    ending_as_trained,
    error_body,
    parsed,
    question_in,
    require_key,
    with_training_prompt,
    within_limits,
)
from lorapar_ray.serving.routing import Threshold, fit_threshold, routing_prompt, stages_by_system
from lorapar_ray.storage.cache import on_this_machine
from lorapar_ray.text import one_line

SYSTEM_HEADER = "x-lorapar-system"
WATCH_S = 1.0
"""Seconds between two looks whether the engine lives."""
CERTAIN = 1e3
"""Log-odds, in nats, if one of the choices has probability zero."""

# The routes may use only imported names: Serve pickles them when the class is decorated, before later definitions.
app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)


@serve.ingress(app)
class Replica:
    """Serves base, stages and `auto` of one run."""

    def __init__(
        self,
        config: dict[str, Any],
        adapters: Mapping[str, str],
        max_rank: int,
        student: str,
        labelled: Mapping[int, list[str]],
        key_digest: str | None,
    ) -> None:
        """Start the engine.

        Args:
            adapters: each stage's adapter: a directory on shared storage, or a folder of an object store.
            student: the student's name in the voting prompt.
            labelled: questions of each System, to fit the threshold of `auto`; empty: no `auto`.
            key_digest: of the clients' key (`requests.digest_of`); None: no key is required.
        """
        self._config, self._labelled = Config.model_validate(config), labelled
        adapters = {name: str(on_this_machine(place)) for name, place in adapters.items()}
        self._adapters = adapters
        if adapters:
            own_files = ExitStack()
            atexit.register(own_files.close)  # the next private directory removes those of a killed replica
            neutral = own_files.enter_context(private_directory(Path(gettempdir()))) / BASE
            write_neutral(neutral, Path(next(iter(adapters.values()))))
            self._adapters = {BASE: str(neutral), **adapters}
        self._key, self._student, settings = key_digest, student, self._config.evaluate
        self._path = resolve_model(self._config.model.path)
        trusted = self._config.model.trust_remote_code
        self._encoder = load_encoder(self._path, self._config.model.system_prompt, trusted)
        arguments = {
            "worker_extension_cls": LOADER,
            **memory_share(settings.resources),
            **engine_arguments(self._path, settings.engine, seed=self._config.seed, trust_remote_code=trusted),
            **(lora_arguments(max_rank, len(self._adapters)) if adapters else {}),
        }
        self._engine = start_async_llm(arguments, Phases("server"), "evaluate.engine")
        self._tokenizer = self._engine.get_tokenizer()
        self._state: Any = None
        self._threshold: Threshold | None = None
        self._asked = 0
        self._watch: asyncio.Task[None] | None = None

    async def ready(self) -> dict[str, Any]:
        """Finish the start: the OpenAI handlers and the threshold of `auto`. Returns the models and the agreement of
        `auto`."""
        if self._watch is None:
            self._watch = asyncio.create_task(self._leave_with_the_engine())
        if self._state is None:
            state = await openai_state(self._engine, self._path, self._adapters)
            await self._verify(state.openai_serving_models.lora_requests)
            self._state = state
            short = {system: [each for each in own if self._fits(each)] for system, own in self._labelled.items()}
            if short and all(short.values()):
                odds = {system: await asyncio.gather(*map(self._odds, own)) for system, own in short.items()}
                self._threshold = fit_threshold(odds[1], odds[2])
        found = self._threshold
        return {"pid": os.getpid()} | ({} if found is None else {"agreement": found.agreement})

    async def _verify(self, loras: Mapping[str, Any]) -> None:
        """Check that every rank computes with the adapters: vLLM serves the base for module names it does not know.

        Raises:
            UserError: names the adapter, and what differs.
        """
        for name, lora in loras.items():
            checked = await self._engine.collective_rpc(
                "lorapar_check_adapter", args=(lora.lora_int_id, lora.lora_path)
            )
            try:
                verified([], checked)
            except PolicyMismatch as error:
                raise UserError(f"serve: the engine does not serve the adapter '{name}': {error}") from error

    async def _leave_with_the_engine(self) -> None:
        """Exit once the engine is dead: Serve replaces a dead replica at once, and an unhealthy one after several
        checks."""
        while not self._engine.errored:
            await asyncio.sleep(WATCH_S)
        os._exit(1)

    async def check_health(self) -> None:
        """Called by Serve."""
        await self.ready()
        await self._engine.check_health()

    @app.get("/health")
    async def health(self) -> Response:
        """Whether the engine lives."""
        await self.check_health()
        return Response(status_code=200)

    @app.get("/v1/models")
    async def models(self, request: Request) -> Response:
        """The names of the models."""
        try:
            require_key(request.headers, self._key)
        except BadRequest as error:
            return JSONResponse(error.body, error.status)
        listed = (await self._state.openai_serving_models.show_available_models()).model_dump()
        listed["data"] = [each for each in listed["data"] if each["id"] in {BASE, *self._adapters}]
        if self._threshold is not None:
            listed["data"].append({**listed["data"][0], "id": AUTO, "root": AUTO})
        return JSONResponse(listed)

    @app.post("/v1/chat/completions")
    async def chat(self, request: Request) -> Response:
        """A chat completion, as a whole or as a stream."""
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

        return await self._answer(
            request, ChatCompletionRequest, self._state.openai_serving_chat.create_chat_completion
        )

    @app.post("/v1/completions")
    async def complete(self, request: Request) -> Response:
        """A completion of a text."""
        from vllm.entrypoints.openai.completion.protocol import CompletionRequest

        return await self._answer(request, CompletionRequest, self._state.openai_serving_completion.create_completion)

    async def _answer(self, request: Request, kind: Any, create: Any) -> Response:
        from vllm.entrypoints.serve.engine.protocol import ErrorResponse
        from vllm.exceptions import VLLMError, VLLMServerError

        headers: dict[str, str] = {}
        try:
            require_key(request.headers, self._key)
            asked = with_training_prompt(parsed(await body_of(request.headers, request.stream())), self._encoder)
            wanted = ending_as_trained(within_limits(kind.model_validate(asked)), self._encoder.end_ids)
            if wanted.model == AUTO and self._threshold is not None:
                system = await self._system(question_in(asked))
                wanted.model, headers = stages_by_system(self._config)[system], {SYSTEM_HEADER: str(system)}
            answer = await create(wanted, request)
        except BadRequest as error:
            return JSONResponse(error.body, error.status)
        except VLLMServerError as error:  # such as a dead engine: another try may succeed
            return JSONResponse(error_body(503, one_line(error, 300)), 503)
        except (ValueError, TypeError, OverflowError, NotImplementedError, VLLMError) as error:
            return JSONResponse(error_body(400, one_line(error, 300)), 400)
        if isinstance(answer, ErrorResponse):
            return JSONResponse(answer.model_dump(), answer.error.code)
        if hasattr(answer, "model_dump"):
            return JSONResponse(answer.model_dump(), headers=headers)
        return StreamingResponse(answer, media_type="text/event-stream", headers=headers)

    async def _system(self, question: str) -> int:
        assert self._threshold is not None
        return 2 if await self._odds(question) >= self._threshold.log_odds else 1

    def _vote(self, question: str) -> tuple[list[int], list[int]]:
        """(token ids of the student's voting prompt, tokens of the two choices)"""
        choice = self._config.label.prompt.choice
        prompt = with_template(routing_prompt(self._config, self._student, question), self._tokenizer, None, choice)
        return choice_tokens(self._tokenizer, prompt, ["1", "2"])

    def _fits(self, question: str) -> bool:
        return len(self._vote(question)[0]) < self._config.evaluate.engine.max_model_len

    async def _odds(self, question: str) -> float:
        """The student's log-odds of System 2, in nats; the base without an adapter votes.

        Raises:
            BadRequest: the question is too long for the engine.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        ids, (first, second) = self._vote(question)
        if len(ids) >= self._config.evaluate.engine.max_model_len:
            raise BadRequest(400, f"model '{AUTO}': the question is too long ({len(ids)} tokens with its prompt)")
        params = SamplingParams(max_tokens=1, temperature=1.0, allowed_token_ids=[first, second], logprobs=2)
        params.output_kind = RequestOutputKind.FINAL_ONLY
        self._asked += 1
        last: Any = None
        lora = self._state.openai_serving_models.lora_requests.get(BASE)
        prompt = {"prompt_token_ids": ids}
        async for output in self._engine.generate(prompt, params, request_id=f"auto-{self._asked}", lora_request=lora):
            last = output
        table = last.outputs[0].logprobs[0]
        low, high = (table[token].logprob if token in table else -math.inf for token in (first, second))
        return float(high - low) if math.isfinite(high - low) else math.copysign(CERTAIN, high - low)
