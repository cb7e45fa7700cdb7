"""Checks a client's request before it reaches the engine."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from lorapar_ray.datasets.chat import Encoder

MOST_BYTES = 2**20
TOO_LARGE = f"the request is larger than {MOST_BYTES} bytes"
MOST_COMPLETIONS = 8
"""Largest `n` of a request."""
MOST_PROMPTS = 64
"""Most prompts of a completions request."""
AUTO = "auto"


class BadRequest(ValueError):
    """A refused request, with its HTTP status."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status

    @property
    def body(self) -> dict[str, Any]:
        """The error in the OpenAI protocol's form."""
        return error_body(self.status, str(self))


def error_body(status: int, why: str) -> dict[str, Any]:
    """An error in the OpenAI protocol's form; its clients repeat a request after a status of 500 and more."""
    kind = "server_error" if status >= 500 else "authentication_error" if status == 401 else "invalid_request_error"
    return {"error": {"message": why, "type": kind, "param": None, "code": status}}


def digest_of(key: str) -> str:
    """The digest that replicas get instead of the key: they can compare keys, but not leak the key."""
    return hashlib.sha256(key.encode()).hexdigest()


def require_key(headers: Mapping[str, str], digest: str | None) -> None:
    """Compare `Authorization: Bearer …` with the key in constant time.

    Args:
        digest: of the key (`digest_of`); None: no key is required.

    Raises:
        BadRequest: the key is wrong or missing.
    """
    given = headers.get("authorization", "").removeprefix("Bearer ")
    if digest is not None and not hmac.compare_digest(digest_of(given), digest):
        raise BadRequest(401, "give the server's key as `Authorization: Bearer KEY`")


async def body_of(headers: Mapping[str, str], parts: AsyncIterator[bytes]) -> bytes:
    """A request's body, from its parts as they arrive; nothing is read beyond the limit.

    Raises:
        BadRequest: the body is too large, or its declared length is.
    """
    declared = headers.get("content-length", "")
    if declared.isdecimal() and (len(declared) > len(str(MOST_BYTES)) or int(declared) > MOST_BYTES):
        raise BadRequest(413, TOO_LARGE)
    body = bytearray()
    async for part in parts:
        body += part
        if len(body) > MOST_BYTES:
            raise BadRequest(413, TOO_LARGE)
    return bytes(body)


def parsed(body: bytes) -> dict[str, Any]:
    """A request's JSON within the limits.

    Raises:
        BadRequest: it is not a JSON object, or exceeds a limit.
    """
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        raise BadRequest(400, "the body is not JSON") from None
    if not isinstance(asked, dict):
        raise BadRequest(400, "the body is not a JSON object")
    prompts = asked.get("prompt")
    if (
        isinstance(prompts, list)
        and any(isinstance(each, list | str) for each in prompts)
        and len(prompts) > MOST_PROMPTS
    ):
        raise BadRequest(400, f"prompt: at most {MOST_PROMPTS} in one request")
    return asked


def within_limits(request: Any) -> Any:
    """A request that vLLM has read, without a place before other clients' requests.

    vLLM takes "9" and 9.0 for the number 9 too, so its fields are checked and not the JSON.

    Raises:
        BadRequest: it asks for too many completions.
    """
    for name in ("n", "best_of"):
        number = getattr(request, name, None)  # vLLM keeps, and ignores, a field that it does not know
        if isinstance(number, int) and number > MOST_COMPLETIONS:
            raise BadRequest(400, f"{name}: at most {MOST_COMPLETIONS}")
    request.priority = 0
    return request


def with_training_prompt(asked: dict[str, Any], encoder: Encoder) -> dict[str, Any]:
    """The request, so that a chat's prompt has the token ids that `encoder` gives it in training.

    With a chat template it gets the run's system prompt, if it has messages but no system prompt. Without one there is
    no system prompt in training, but the tokenizer's usual special tokens; vLLM leaves these out of a chat by default.
    """
    messages = asked.get("messages")
    if not isinstance(messages, list) or not messages:
        return asked
    if encoder.tokenizer.chat_template is None:
        return {"add_special_tokens": True, **asked}
    if encoder.system_prompt is None or any(
        isinstance(each, dict) and each.get("role") == "system" for each in messages
    ):
        return asked
    return {**asked, "messages": [{"role": "system", "content": encoder.system_prompt}, *messages]}


def ending_as_trained(request: Any, end_ids: Sequence[int]) -> Any:
    """A request that vLLM has read, whose answer also ends at `end_ids`: training may end answers with another token
    than the model's files name. A client that sets `ignore_eos` wants none of them.
    """
    if not request.ignore_eos:
        request.stop_token_ids = list(dict.fromkeys([*(request.stop_token_ids or []), *end_ids]))
    return request


def question_in(asked: Mapping[str, Any]) -> str:
    """The question by which `auto` chooses: the user's last message, or the prompt.

    Raises:
        BadRequest: there is no text.
    """
    found: Any = asked.get("prompt")
    messages = asked.get("messages")
    if isinstance(messages, list):
        own = [each.get("content") for each in messages if isinstance(each, dict) and each.get("role") == "user"]
        found = own[-1] if own else None
        if isinstance(found, list):
            found = " ".join(
                part["text"] for part in found if isinstance(part, dict) and isinstance(part.get("text"), str)
            )
    if not isinstance(found, str) or not found.strip():
        raise BadRequest(400, f"model '{AUTO}' needs one question: give one prompt, or a message of the user with text")
    return found
