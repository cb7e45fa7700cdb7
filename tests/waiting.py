"""Waits for what a test has begun, and work beside a test."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager

LIMIT_S = 600
"""Until what takes seconds on an idle machine has to be over on a busy one."""


def wait_until(
    what: str,
    seen: Callable[[], object],
    limit_s: float = 120,
    every_s: float = 0.05,
    alive: Callable[[], object] = lambda: True,
) -> None:
    """Until `seen()` is true.

    Args:
        alive: false once it can become true no more.

    Raises:
        TimeoutError: names what was waited for.
        AssertionError: `alive()` was false before it; names it too.
    """
    pause, deadline = threading.Event(), time.monotonic() + limit_s  # a test may replace `time.sleep`
    while not seen():
        assert alive() or seen(), f"ended before: {what}"
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        pause.wait(every_s)


@contextmanager
def beside(work: Callable[[], object]) -> Iterator[None]:
    """Call `work` once, in a thread, while the block runs; it has to end, and what it raises is raised after the block.

    If the block raises, nothing waits for `work`, whose thread ends with the process.
    """
    outcome: Future[None] = Future()

    def run() -> None:
        try:
            work()
            outcome.set_result(None)
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    yield
    outcome.result(LIMIT_S)
