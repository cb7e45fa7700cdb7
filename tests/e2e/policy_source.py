"""The learner's side of the tests of served policies: an adapter that moves, and its own log-probabilities."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
import torch
from transformers import AutoModelForCausalLM

from lorapar_ray.adapters import adapter_parameters, attach_lora, save_adapter
from lorapar_ray.engines.canaries import Canary
from lorapar_ray.engines.policy import PolicySender, note_of
from lorapar_ray.logprobs import token_logprobs

TOKENS = [5 + 37 * k % 4000 for k in range(80)]
"""Of the one canary; those from START on are scored."""
START = 64


class Source:
    """A rank 4 adapter of a student, and the policies it becomes."""

    def __init__(self, student: Path, dtype: torch.dtype = torch.float32) -> None:
        base = AutoModelForCausalLM.from_pretrained(student, dtype=dtype)
        self.model = attach_lora(base, rank=4, alpha=8, init="gaussian")
        self.parameters = adapter_parameters(self.model)
        with TemporaryDirectory() as folder:
            save_adapter(self.model, Path(folder) / "adapter")
            self.sender = PolicySender((Path(folder) / "adapter" / "adapter_config.json").read_text())
        self.version = -1

    @torch.no_grad()
    def next(self, *modules: str) -> tuple[Any, list[Canary]]:
        """Another policy; with `modules` an adapter of only these."""
        generator = torch.Generator().manual_seed(self.version + 1)
        sent = {key: it for key, it in self.parameters.items() if not modules or key.split(".")[-3] in modules}
        for key, parameter in self.parameters.items():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator) * (key in sent))
        return self.published(sent)

    @torch.no_grad()
    def step(self, size: float) -> tuple[Any, list[Canary]]:
        """A policy in which every element moved by about `size`."""
        generator = torch.Generator().manual_seed(self.version + 1)
        for parameter in self.parameters.values():
            parameter += size * torch.randn(parameter.shape, generator=generator)
        return self.published(self.parameters)

    def published(self, sent: Any) -> tuple[Any, list[Canary]]:
        self.version += 1
        policy = self.sender.policy(self.version, sent)
        return note_of(policy, ray.put(policy)), self.canaries()

    @torch.no_grad()
    def canaries(self) -> list[Canary]:
        ids = torch.tensor([TOKENS])
        logprobs, _ = token_logprobs(self.model(input_ids=ids).logits[:, START - 1 : -1].float(), ids[:, START:])
        return [Canary(TOKENS, START, logprobs[0].tolist())]
