"""An environment whose module can be imported on a process's main thread only."""

import threading
from typing import Any

if threading.current_thread() is not threading.main_thread():
    raise RuntimeError("not here")


async def rollout(engine: Any, row: dict[str, Any]) -> Any:
    """Never played."""
