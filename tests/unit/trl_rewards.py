"""Rewards written for TRL's GRPOTrainer, and some that try forbidden things."""

import asyncio
import contextlib
import os
import subprocess
import sys
from typing import Any

import numpy as np
import torch


def right(completions: list[str], answer: list[int], **kwargs: Any) -> list[float]:
    return [float(str(want) in done) for done, want in zip(completions, answer, strict=True)]


def by_column(completions: list[str], ground_truth: list[dict[str, int]], **kwargs: Any) -> list[float]:
    return [float(each["value"]) for each in ground_truth]


def keyword_only(*, prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
    return [float(len(done)) for done in completions]


def names(prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    assert kwargs["trainer_state"].global_step == 3
    kwargs["log_extra"]("length", [1] * len(prompts))
    kwargs["log_metric"]("mean", 0.5)
    return [float(len(ids)) for ids in completion_ids]


def chat(prompts: list[Any], completions: list[Any], **kwargs: Any) -> list[float]:
    assert [message["role"] for message in prompts[0]] == ["system", "user"]
    return [float(done == [{"role": "assistant", "content": "4"}]) for done in completions]


def no_kwargs(prompts: list[str], completions: list[str]) -> list[float]:
    return [1.0] * len(completions)


def ours(questions: list[str], texts: list[str], **columns: Any) -> list[float]:
    return [float(text == want) for text, want in zip(texts, columns["answer"], strict=True)]


def nothing(prompts: list[str], completions: list[str], **kwargs: Any) -> list[None]:
    return [None] * len(completions)


def forgot_return(prompts: list[str], completions: list[str], **kwargs: Any) -> None: ...


def one_number(prompts: list[str], completions: list[str], **kwargs: Any) -> float:
    return 1.0


def too_many(prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
    return [1.0] * 7


def arrays(prompts: list[str], completions: list[str], **kwargs: Any) -> Any:
    return np.array([len(done) for done in completions])


def tensors(prompts: list[str], completions: list[str], **kwargs: Any) -> Any:
    return torch.tensor([1.0] * len(completions))


def bools(prompts: list[str], completions: list[str], **kwargs: Any) -> list[bool]:
    return [done == "4" for done in completions]


def typo(prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
    return [float(kwargs["grund_truth"][0] == done) for done in completions]


async def later(prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
    await asyncio.sleep(0)
    return [1.0] * len(completions)


class Callable:
    async def __call__(self, prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
        return [2.0] * len(completions)


instance = Callable()


def sees_secrets(prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
    return [float("OPENAI_API_KEY" in os.environ or "HF_TOKEN" in os.environ)] * len(completions)


def forges(prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
    for number in range(256):
        with contextlib.suppress(OSError):
            os.write(number, b'\n{"number": 1, "values": [9, 9]}\n' * 3)
    print("out", sys.stdin.read())
    return [1.0] * len(completions)


def breeds(prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
    double = "import os, sys; os.setsid(); os.fork() and os._exit(0); os.execvp('sleep', ['sleep', sys.argv[1]])"
    for seconds in completions:
        subprocess.Popen(["sleep", seconds], start_new_session=True)
        subprocess.Popen([sys.executable, "-c", double, seconds])
    return [1.0] * len(completions)
