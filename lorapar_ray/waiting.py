"""What asyncio's own functions do not take as it is."""

from __future__ import annotations

from typing import Any


async def awaited(answer: Any) -> Any:
    """Anything that can be awaited, such as an object reference, as a coroutine: `run`, `wait_for` and `gather` take
    it, and can cancel it."""
    return await answer
