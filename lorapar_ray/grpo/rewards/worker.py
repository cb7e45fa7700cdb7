"""A reward process: reads one JSON request per line, answers one JSON line each.

    python -m lorapar_ray.grpo.rewards.worker '{"rewards": [...], "memory_mb": 1024, "time_limit_s": 5, "sandbox": {}}'

Rewards may print what they like: standard output is moved aside before any of them is imported. The address space is
limited to what the process holds when it is ready plus `memory_mb`.
"""

from __future__ import annotations

import json
import os
import sys
from math import isfinite
from typing import Any


def serve(settings: dict[str, Any]) -> None:
    """Say `ready`, or why not, then answer requests until input ends.

    A request is {number, reward, prompts, completions, columns}, its answer {number, values} or {number, error}; a
    value that is no finite number comes back as null.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from lorapar_ray.config import SandboxConfig
    from lorapar_ray.errors import UserError
    from lorapar_ray.grpo.rewards import code, expressions, limits
    from lorapar_ray.grpo.rewards.registry import get_reward

    rewards = settings["rewards"]
    try:
        for name in rewards:
            get_reward(name)
        if code.CODE_TESTS in rewards:
            code.configure(SandboxConfig.model_validate(settings["sandbox"]), settings["time_limit_s"])
    except UserError as error:
        answers.write(json.dumps({"error": str(error)}) + "\n")
        answers.flush()
        return
    if any(name == "numeric_answer" or name.startswith(expressions.__name__) for name in rewards):
        expressions.load()
    limits.set_limits(settings["memory_mb"])
    answers.write('"ready"\n')
    answers.flush()
    for line in sys.stdin:
        request = json.loads(line)
        answers.write(json.dumps({"number": request["number"], **_answer(get_reward, request)}) + "\n")
        answers.flush()


def _answer(get_reward: Any, request: dict[str, Any]) -> dict[str, Any]:
    try:
        function = get_reward(request["reward"])
        values = function(request["prompts"], request["completions"], **request["columns"])
        return {"values": [float(value) if value is not None and isfinite(value) else None for value in values]}
    except BaseException as error:  # a user's reward may raise anything, SystemExit too
        return {"error": f"{type(error).__name__}: {error}"[:500]}


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
