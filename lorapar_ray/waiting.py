"""A helper for awaitables that asyncio's functions do not accept."""

from __future__ import annotations

from typing import Any


async def awaited(answer: Any) -> Any:
    """Anything that can be awaited, such as an object reference, as a coroutine: `run`, `wait_for` and `gather` take
    it, and can cancel it."""
    return await answer
