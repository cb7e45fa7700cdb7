"""Rewards that misbehave, for fault injection."""

import os
import threading
from typing import Any


def _fails(kind: str, completion: str) -> None:
    if completion != "bad":
        return
    if kind == "raise":
        raise RuntimeError("no")
    if kind == "hang":
        threading.Event().wait()
    if kind == "die":
        os.kill(os.getpid(), 9)
    if kind == "eat":
        print(len(bytearray(8 * 2**30)))


def _reward(kind: str) -> Any:
    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        for completion in completions:
            print("noise on standard output")
            _fails(kind, completion)
        return [float("nan") if kind == "nan" and completion == "bad" else 1.0 for completion in completions]

    return reward


raises, hangs, dies, eats, divides_by_zero = (_reward(kind) for kind in ("raise", "hang", "die", "eat", "nan"))
