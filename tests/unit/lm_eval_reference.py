"""The simplest implementation of a model's requests, for lm-eval's tests."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from lorapar_ray.engines.requests import Answer, Request


class Reference:
    """Answers requests with transformers, one at a time: the simplest implementation of each request."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.asked: list[Request] = []

    @torch.no_grad()
    def __call__(self, requests: Sequence[Request]) -> list[Answer]:
        self.asked += requests
        return [self._answer(request) for request in requests]

    def _answer(self, request: Request) -> Answer:
        ids = list(request.ids)
        if request.kind == "generate":
            ends = set(request.sampling["stop_token_ids"])
            tokens: list[int] = []
            while len(tokens) < request.sampling["max_tokens"] and not ends & set(tokens):
                tokens.append(int(self._logprobs([*ids, *tokens])[-1].argmax()))
            return Answer(request.key, tokens=tokens)
        logprobs = self._logprobs(ids)
        if request.kind == "choose":
            last = logprobs[-1]
            return Answer(
                request.key,
                logprobs=[float(last[token]) for token in request.targets],
                greedy=[int(last.argmax()) == token for token in request.targets],
            )
        places = range(request.start, len(ids))
        return Answer(
            request.key,
            logprobs=[float(logprobs[at - 1, ids[at]]) for at in places],
            greedy=[int(logprobs[at - 1].argmax()) == ids[at] for at in places],
        )

    def _logprobs(self, ids: Sequence[int]) -> torch.Tensor:
        return self.model(torch.tensor([ids])).logits[0].log_softmax(-1)


def lines(file: Path, *rows: dict[str, Any]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)
