"""A teacher behind an OpenAI-compatible endpoint: text completions, or chat if it offers only that."""

from __future__ import annotations

import asyncio
import json
import time
import zlib
from typing import Any

from lorapar_ray.boundary import boundary
from lorapar_ray.config import TeacherConfig
from lorapar_ray.labeling.prompts import with_thought
from lorapar_ray.labeling.teachers import Asked, Refused, ShutOut
from lorapar_ray.labeling.time_limit import not_counted
from lorapar_ray.text import one_line

RETRY_STATUS = (408, 409, 425, 429, 500, 502, 503, 504)
SHUT_OUT_STATUS = (401, 402, 403, 404)
COMPLETION_ALTERNATIVES, CHAT_ALTERNATIVES = 5, 20
"""Most alternatives per token that both kinds of services return."""
MOST_BYTES = 8 * 2**20
"""Most bytes of one reply; log-probabilities of a long thought take less."""
CHAT_WORDS = 8
"""Tokens a chat model may spend on words around its choice."""


class RemoteTeacher:
    """Asks an endpoint within its rate limit, and pauses all requests when the endpoint asks for it."""

    def __init__(
        self, teacher: TeacherConfig, choice: str, timeout_s: float, requests_per_second: float | None, key: str | None
    ) -> None:
        import httpx

        headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {key}"} if key else {})
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
        with boundary(f"teacher '{teacher.name}': base_url is not a URL", "write it as https://host/v1"):
            self._client = httpx.AsyncClient(
                base_url=str(teacher.base_url), headers=headers, timeout=timeout_s, limits=limits
            )
        self._config = teacher
        self._choice = choice
        self._timeout_s = timeout_s
        self._gap_s = 1 / requests_per_second if requests_per_second else 0.0
        self._free_at = 0.0
        self._turn = asyncio.Lock()  # first come, first served; who is cancelled leaves the queue

    async def ask(self, prompt: str, choices: list[str]) -> Asked:
        """Log-probabilities of the choices among the endpoint's top alternatives.

        Raises:
            ConnectionError: a status worth a retry.
            Refused: any other error status.
            ValueError: an answer without a choice.
        """
        if self._config.endpoint == "chat":
            return await self._chat(prompt, choices)
        thought = 0
        if self._config.thinking_tokens:
            opened = prompt.removesuffix(self._choice)
            free = {"prompt": opened, "max_tokens": self._config.thinking_tokens, "temperature": 0.6}
            written, _ = await self._post("/completions", free)
            text = str(_part(written, "choices", 0, "text"))
            prompt, thought = with_thought(opened, text, self._choice), _tokens(written)
        body = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": COMPLETION_ALTERNATIVES}
        answer, latency_s = await self._post("/completions", body)
        table = _part(answer, "choices", 0, "logprobs", "top_logprobs", 0)
        if not isinstance(table, dict):
            raise ValueError("the answer has no log-probabilities")
        return Asked(choice_log_probs(table.items(), choices), _tokens(answer) + thought, latency_s)

    async def _chat(self, prompt: str, choices: list[str]) -> Asked:
        """The last token that is a choice: a chat model may write words or a long thought before it."""
        body = {
            "messages": [{"role": "user", "content": f"{prompt} (answer with the number only)"}],
            "max_tokens": self._config.thinking_tokens + CHAT_WORDS,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": CHAT_ALTERNATIVES,
        }
        answer, latency_s = await self._post("/chat/completions", body)
        positions = _part(answer, "choices", 0, "logprobs", "content")
        chosen = [place for place in positions if str(place["token"]).strip() in choices]
        if not chosen:
            raise ValueError("no choice in the answer")
        table = [(each["token"], each["logprob"]) for each in chosen[-1]["top_logprobs"]]
        return Asked(choice_log_probs(table, choices), _tokens(answer), latency_s)

    async def _post(self, path: str, body: dict[str, Any]) -> tuple[dict[str, Any], float]:
        """(the JSON answered, seconds it took)"""
        await self._wait_for_turn()
        start = time.monotonic()
        request = self._exchange(path, {"model": self._config.model, **body, **self._config.extra_body})
        response, content = await asyncio.wait_for(request, self._timeout_s)  # httpx limits each read, not the whole
        if response.status_code == 429:
            self._pause(response.headers.get("retry-after"))
        if response.status_code in RETRY_STATUS:
            raise ConnectionError(f"status {response.status_code}")
        if not response.is_success:
            kind = ShutOut if response.status_code in SHUT_OUT_STATUS else Refused
            raise kind(f"status {response.status_code}: {one_line(content.decode(errors='replace'), 120)}")
        answer = json.loads(content)
        if not isinstance(answer, dict):
            raise ValueError("the answer is not a JSON object")
        return answer, time.monotonic() - start

    async def _exchange(self, path: str, body: dict[str, Any]) -> tuple[Any, bytes]:
        """(the response without its body, the body): at most `MOST_BYTES` of it are read or decompressed.

        Raises:
            ValueError: the body is larger, or has an encoding that was not requested.
        """
        async with self._client.stream("POST", path, json=body) as response:
            raw = bytearray()
            async for part in response.aiter_raw():
                raw += part
                if len(raw) > MOST_BYTES:
                    raise ValueError(f"the answer is larger than {MOST_BYTES} bytes")
        return response, inflated(bytes(raw), response.headers.get("content-encoding", "identity"))

    async def _wait_for_turn(self) -> None:
        """Wait within the rate limit and the endpoint's pauses; a request that is cancelled meanwhile takes no turn."""
        clock = asyncio.get_running_loop().time
        async with not_counted(), self._turn:
            begun = clock()
            while (wait := self._free_at - clock()) > 0:  # a pause may be added during the wait
                await asyncio.sleep(wait)
            self._free_at = max(self._free_at, begun) + self._gap_s  # a late awakening does not lower the rate

    def _pause(self, retry_after: str | None) -> None:
        """Pause all requests for the endpoint's Retry-After (seconds; for a date the caller's backoff applies)."""
        try:
            seconds = float(retry_after or "nan")
        except ValueError:
            return
        if seconds >= 0:
            now = asyncio.get_running_loop().time()
            self._free_at = max(self._free_at, now + min(seconds, self._timeout_s))


def choice_log_probs(alternatives: Any, choices: list[str]) -> list[float]:
    """Log-probability of each choice, from (token, log-probability) pairs; the larger one if two tokens have the same
    text.

    A missing choice is less likely than all present ones: it gets their minimum minus one nat.

    Raises:
        ValueError: none is there.
    """
    found: dict[str, float] = {}
    for token, value in alternatives:
        name = str(token).strip()
        found[name] = max(float(value), found.get(name, float("-inf")))
    if not any(choice in found for choice in choices):
        raise ValueError("no choice among the alternatives")
    floor = min(found.values()) - 1.0
    return [found.get(choice, floor) for choice in choices]


def _tokens(answer: dict[str, Any]) -> int:
    usage = answer.get("usage")
    return int(usage.get("total_tokens") or 0) if isinstance(usage, dict) else 0


def inflated(body: bytes, encoding: str) -> bytes:
    """A reply's body without gzip or deflate, which some proxies use without a request for it.

    Raises:
        ValueError: it would be larger than `MOST_BYTES`, ends early, or is encoded in another way.
    """
    if encoding.strip().lower() in ("", "identity"):
        return body
    if encoding.strip().lower() not in ("gzip", "x-gzip", "deflate"):
        raise ValueError(f"the answer is encoded as {one_line(encoding, 40)}, which was not asked for")
    stream = zlib.decompressobj(zlib.MAX_WBITS | 32)  # gzip or zlib, as the header says
    try:
        whole = stream.decompress(body, MOST_BYTES + 1)
    except zlib.error as error:
        raise ValueError(f"the answer is not {encoding} ({error})") from error
    if len(whole) > MOST_BYTES:
        raise ValueError(f"the answer inflates to more than {MOST_BYTES} bytes")
    if not stream.eof:
        raise ValueError("the answer ends early")
    return whole


def _part(answer: Any, *path: str | int) -> Any:
    """A value deep inside an answer.

    Raises:
        ValueError: a part of the path is missing.
    """
    for step in path:
        try:
            answer = answer[step]
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"the answer has no '{step}'") from error
    return answer
