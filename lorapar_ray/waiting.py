"""Helpers for awaitables."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

T = TypeVar("T")


async def awaited(answer: Any) -> Any:
    """Any awaitable, such as an object reference, as a coroutine, which `run`, `wait_for` and `gather` accept and can
    cancel."""
    return await answer


async def foreign(answer: Awaitable[T]) -> T:
    """Await foreign code; a CancelledError of its own is an error like any other.

    `gather` would take it for the cancellation of this task.

    Raises:
        CancelledError: this task is cancelled.
        RuntimeError: only something that the code awaits was cancelled.
    """
    try:
        return await answer
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise RuntimeError("CancelledError: it awaits a task that was cancelled") from error
