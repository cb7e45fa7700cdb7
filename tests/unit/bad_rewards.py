"""Rewards that misbehave, for fault injection."""

import os
import socket
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
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
    if kind == "leave":
        os._exit(3)
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
leaves = _reward("leave")


def reaches_out(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """1 for the environment, 2 for the network, 4 for reading, 8 for writing elsewhere, added up."""

    def listens() -> bool:
        socket.create_server(("127.0.0.1", 0)).close()
        return True

    def writes() -> bool:
        with tempfile.NamedTemporaryFile(dir=Path(__file__).parent):
            return True

    reached = 0
    for worth, attempt in (
        (1, lambda: "LORAPAR_SECRET" in os.environ),
        (2, listens),
        (4, lambda: bool(Path("/etc/passwd").read_text())),
        (8, writes),
    ):
        with suppress(OSError):
            reached += worth * attempt()
    return [float(reached)] * len(completions)


reaches_out_openly = reaches_out


async def remote(prompts: list[str], completions: list[str], url: list[str], **_: Any) -> list[float]:
    """A remote reward, over HTTP."""
    import httpx

    async with httpx.AsyncClient(timeout=None) as client:
        answer = await client.post(url[0], json=completions)
    values: list[float] = answer.json()
    return values


def one_mean(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """One value for the whole call: right for a single completion."""
    return [sum(map(float, completions)) / len(completions)]


def unlike(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """No value for a duplicate."""
    return [1.0 for _ in set(completions)]


def at_most_two(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    if len(completions) > 2:
        raise RuntimeError("too many")
    return [1.0] * len(completions)
