"""Questions and answers as token ids: the one place that decides how a prompt is formatted.

Scoring, both training stages, rollouts and evaluation all tokenise through here, so a model is never trained on one
format and sampled in another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorapar_ray.errors import UserError
from lorapar_ray.models import loading

NO_LOSS = -100
"""Label of a token that is not trained on."""


@dataclass(frozen=True)
class Encoder:
    """Formats prompts with the tokenizer's chat template, or as plain text where it has none."""

    tokenizer: Any
    system_prompt: str | None = None

    def prompt_text(self, prompt: str) -> str:
        """The prompt up to where the answer begins."""
        if self.tokenizer.chat_template is None:
            return f"{prompt}\n"
        messages = [{"role": "user", "content": prompt}]
        if self.system_prompt is not None:
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        text: str = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return text

    def prompt_ids(self, prompt: str) -> list[int]:
        """Token ids of `prompt_text`; a template writes its own special tokens, plain text gets the usual ones."""
        plain = self.tokenizer.chat_template is None
        ids: list[int] = self.tokenizer(self.prompt_text(prompt), add_special_tokens=plain)["input_ids"]
        return ids

    def response_ids(self, response: str) -> list[int]:
        """Token ids of the answer and the end-of-sequence token that stops generation."""
        ids: list[int] = self.tokenizer(response, add_special_tokens=False)["input_ids"]
        return [*ids, self.tokenizer.eos_token_id]

    def example(self, prompt: str, response: str, max_length: int) -> tuple[list[int], int]:
        """(token ids, index where the response begins), the response cut to `max_length`.

        Raises:
            UserError: the prompt alone is longer than `max_length`.
        """
        ids = self.prompt_ids(prompt)
        if len(ids) >= max_length:
            raise UserError(
                f"prompt '{prompt[:40]}…' has {len(ids)} tokens and leaves no room for an answer; raise max_length"
            )
        return (ids + self.response_ids(response))[:max_length], len(ids)


def load_encoder(model_path: str, system_prompt: str | None, trust_remote_code: bool = False) -> Encoder:
    """Encoder with the tokenizer of `model_path`; it pads with its end-of-sequence token if it has no other."""
    from transformers import AutoTokenizer

    with loading(model_path):
        tokenizer = AutoTokenizer.from_pretrained(model_path, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return Encoder(tokenizer, system_prompt)


def decode(encoder: Encoder, ids: Sequence[int]) -> str:
    """Text of generated ids, special tokens dropped."""
    text: str = encoder.tokenizer.decode(ids, skip_special_tokens=True)
    return text
