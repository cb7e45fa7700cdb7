"""An environment that blocks; its workers import it in no time."""

import time
from typing import Any


async def blocks(engine: Any, row: dict[str, Any]) -> Any:
    """Blocks its worker on question 0; other questions' episodes end without a turn of the policy."""
    if row["id"] == "0":
        time.sleep(600)
    return engine.begin(row["prompt_ids"])
