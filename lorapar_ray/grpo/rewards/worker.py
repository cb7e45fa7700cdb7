"""A reward process: reads one JSON request per line, answers one sealed JSON line each.

    python -m lorapar_ray.grpo.rewards.worker SETTINGS  (JSON, as `RewardProcess` makes it)

No module of this package may import this one: else Python warns at each start that it is imported already.

The channel is moved to other file descriptors before any reward is imported: standard input is empty, rewards print to
standard error, and an answer counts only after the seal of its request. So a program that writes to every open file
cannot answer. A reward that reads this process's memory can, but it is the user's own code; model-written code must not
run here (`isolate: true`, `code_tests`). The address space is limited to what the process holds when it is ready plus
`memory_mb`.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
from typing import Any

ASIDE = 60
"""The lowest file descriptor of the channel."""


def serve(settings: dict[str, Any]) -> None:
    """Report that it is ready, or why not, then answer requests until input ends.

    A request is {number, seal, reward, prompts, completions, columns}, its answer {number, values} or {number, error,
    cause}.
    """
    requests = os.fdopen(_aside(0, os.O_RDONLY), "r", encoding="utf-8", newline="\n")
    answers = os.fdopen(_aside(1, None), "w", encoding="utf-8")
    from lorapar_ray.config import SandboxConfig
    from lorapar_ray.errors import UserError
    from lorapar_ray.grpo.rewards import code, expressions, limits
    from lorapar_ray.grpo.rewards.registry import get_reward

    def answer(seal: str, content: dict[str, Any]) -> None:
        answers.write(f"\n{seal}{json.dumps(content)}\n")
        answers.flush()

    rewards, sandbox = settings["rewards"], SandboxConfig.model_validate(settings["sandbox"])
    try:
        for name in rewards:
            get_reward(name)
        if tests_code := code.CODE_TESTS in rewards:
            code.configure(sandbox)
    except UserError as error:
        answer(settings["ready"], {"error": str(error)})
        return
    if any(name == "numeric_answer" or name.startswith(expressions.__name__) for name in rewards):
        expressions.load()
    limits.set_limits(settings["memory_mb"], sandbox.memory_mb if tests_code else 0)
    answer(settings["ready"], {})
    for line in requests:
        request = json.loads(line)
        answer(request.pop("seal"), {"number": request["number"], **_answer(get_reward, request)})


def _aside(number: int, empty: int | None) -> int:
    """A private copy of a standard stream; the stream itself becomes an empty file, or (None) standard error."""
    copy = fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, ASIDE)
    if empty is None:
        os.dup2(2, number)
    else:
        null = os.open(os.devnull, empty)
        os.dup2(null, number)
        os.close(null)
    return copy


def _answer(get_reward: Any, request: dict[str, Any]) -> dict[str, Any]:
    from lorapar_ray.grpo.rewards.calling import NotOneEach, call

    name = request["reward"]
    own = ":" not in name or name.startswith("lorapar_ray.")
    try:
        return {"values": call(get_reward(name), request, own)}
    except NotOneEach as error:
        return {"error": str(error), "cause": "wrong_count"}
    except BaseException as error:  # a user's reward may raise anything, SystemExit too
        return {"error": f"{type(error).__name__}: {error}"[:500], "cause": "raised"}


if __name__ == "__main__":
    SETTINGS = json.loads(sys.argv[1])
    if SETTINGS.get("guarded"):
        from lorapar_ray.grpo.rewards.guardian import guarded

        guarded(lambda: serve(SETTINGS))
    else:
        serve(SETTINGS)
