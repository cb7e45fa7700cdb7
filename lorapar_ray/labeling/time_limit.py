"""A time limit that does not count waits for a rate limit.

Waiting for a turn is no failure of the teacher. If it counted, a queue longer than the limit would never shrink: each
question would time out before its turn.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar

_scope: ContextVar[asyncio.Timeout | None] = ContextVar("time_limit", default=None)


@asynccontextmanager
async def time_limit(seconds: float) -> AsyncIterator[asyncio.Timeout]:
    """Limit the block's time without its `not_counted` parts; yields the scope, which knows whether it has expired.

    Raises:
        TimeoutError: the block takes longer.
    """
    async with asyncio.timeout(seconds) as scope:
        token = _scope.set(scope)
        try:
            yield scope
        finally:
            _scope.reset(token)


@asynccontextmanager
async def not_counted() -> AsyncIterator[None]:
    """Stop the clock of the `time_limit` around the block, if any."""
    scope, loop = _scope.get(), asyncio.get_running_loop()
    if scope is None or scope.expired() or (ends := scope.when()) is None:
        yield
        return
    left = ends - loop.time()
    scope.reschedule(None)
    try:
        yield
    finally:
        scope.reschedule(loop.time() + left)
