"""A helper for awaitables that asyncio's functions do not accept."""

from __future__ import annotations

from typing import Any


async def awaited(answer: Any) -> Any:
    """Any awaitable, such as an object reference, as a coroutine, which `run`, `wait_for` and `gather` accept and can
    cancel."""
    return await answer
