"""Looking again and again while something runs."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def meanwhile(look: Callable[[], object], every_s: float) -> Iterator[None]:
    """Call `look` in a thread while the block runs."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(every_s):
            look()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
