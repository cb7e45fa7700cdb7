"""Waits for what a test has begun."""

import threading
import time
from collections.abc import Callable


def wait_until(what: str, seen: Callable[[], object], limit_s: float = 120, every_s: float = 0.05) -> None:
    """Until `seen()` is true.

    Raises:
        TimeoutError: names what was waited for.
    """
    pause, deadline = threading.Event(), time.monotonic() + limit_s  # a test may replace `time.sleep`
    while not seen():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        pause.wait(every_s)
