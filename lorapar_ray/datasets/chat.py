"""Questions and answers as token ids: the only place that formats prompts and defines where an answer ends.

Scoring, both training stages, rollouts and evaluation all tokenise through here, so training and sampling always use
the same format and the same end tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lorapar_ray.boundary import read_object
from lorapar_ray.errors import UserError
from lorapar_ray.heavy_imports import is_ray_worker, leave_out_torch
from lorapar_ray.models import loading
from lorapar_ray.text import one_line

NO_LOSS = -100
"""Label of a token that is not trained on."""
Prompt = str | list[dict[str, str]]
"""One user turn as text, or the messages ({role, content}) of a chat up to where the answer begins."""
SAVE_AGAIN = "save the model again, or correct the file"
LARGEST_ID = 2**31
_PROBE = "lorapar"
_ANSWER = "lorapar-answer"


@dataclass(frozen=True)
class Encoder:
    """Formats prompts with the tokenizer's chat template, or as plain text if it has none."""

    tokenizer: Any
    system_prompt: str | None = None
    model_ends: tuple[int, ...] = ()
    """End tokens that the model's own files name."""

    @cached_property
    def end_id(self) -> int:
        """The token that ends an answer in training: the one that the chat template writes after it.

        Raises:
            UserError: neither the template nor the tokenizer has an end token.
        """
        written = self._template_end()
        for end in (written, self.tokenizer.eos_token_id, *self.model_ends):
            if end is not None:
                return int(end)
        raise UserError(f"model '{self._model}': its tokenizer names no end-of-sequence token; set eos_token")

    @cached_property
    def end_ids(self) -> list[int]:
        """Every token at which sampling stops: the template's, the tokenizer's and the generation config's."""
        eos = self.tokenizer.eos_token_id
        return list(dict.fromkeys([self.end_id, *([] if eos is None else [int(eos)]), *self.model_ends]))

    def prompt_text(self, prompt: Prompt) -> str:
        """The prompt up to where the answer begins.

        Raises:
            UserError: the chat template refuses the messages, or there are some and no template.
        """
        if self.tokenizer.chat_template is None:
            if not isinstance(prompt, str):
                raise UserError(
                    f"model '{self._model}': has no chat template, and the data's prompts are lists of messages; "
                    "give prompts as text or another model"
                )
            return f"{prompt}\n"
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if self.system_prompt is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        return self._templated(messages, add_generation_prompt=True)

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Token ids of `prompt_text`; a template writes its own special tokens, plain text gets the usual ones."""
        plain = self.tokenizer.chat_template is None
        ids: list[int] = self.tokenizer(self.prompt_text(prompt), add_special_tokens=plain)["input_ids"]
        return ids

    def response_ids(self, response: str) -> list[int]:
        """Token ids of the answer and the token that ends it."""
        ids: list[int] = self.tokenizer(response, add_special_tokens=False)["input_ids"]
        return [*ids, self.end_id]

    def example(self, prompt: Prompt, response: str, max_length: int) -> tuple[list[int], int]:
        """(token ids, index where the response begins), the response cut to `max_length`.

        Raises:
            ValueError: the prompt alone is longer than `max_length`.
        """
        ids = self.prompt_ids(prompt)
        if len(ids) >= max_length:
            raise ValueError(f"a prompt of {len(ids)} tokens leaves no room for an answer within {max_length}")
        return (ids + self.response_ids(response))[:max_length], len(ids)

    def examples(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[tuple[list[int], int]]:
        """(token ids, index where the response begins) of several questions at once, nothing cut."""
        plain = self.tokenizer.chat_template is None
        texts = [self.prompt_text(prompt) for prompt in prompts]
        before = self.tokenizer(texts, add_special_tokens=plain)["input_ids"]
        after = self.tokenizer(list(responses), add_special_tokens=False)["input_ids"]
        return [([*ids, *more, self.end_id], len(ids)) for ids, more in zip(before, after, strict=True)]

    def continuation_ids(self, messages: Sequence[dict[str, Any]], **template: Any) -> list[int]:
        """Token ids that continue a chat after an answer: its end token, `messages`, and the start of the next answer.
        Without a chat template: their texts, a line each.

        Args:
            template: further arguments of the chat template.

        Raises:
            UserError: the chat template refuses the messages.
        """
        if self.tokenizer.chat_template is None:
            text = "".join(f"\n{message['content']}" for message in messages) + "\n"
        else:
            before = [{"role": "user", "content": _PROBE}, {"role": "assistant", "content": _ANSWER}]
            whole = self._templated([*before, *messages], add_generation_prompt=True, **template)
            text = whole.partition(_ANSWER)[2]
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def answer_text(self, ids: Sequence[int], stop: Sequence[str] = ()) -> str:
        """Text of sampled ids up to the first end token and the first stop string: what is judged and rewarded."""
        ends = set(self.end_ids)
        length = next((place for place, token in enumerate(ids) if token in ends), len(ids))
        text: str = self.tokenizer.decode(list(ids[:length]), skip_special_tokens=True)
        found = [place for each in stop if (place := text.find(each)) >= 0]
        return text[: min(found)] if found else text

    @property
    def _model(self) -> str:
        return str(self.tokenizer.name_or_path)

    def _templated(self, messages: list[dict[str, Any]], **options: Any) -> str:
        from jinja2.exceptions import TemplateError

        try:
            text: str = self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            fix = "leave model.system_prompt out" if messages[0]["role"] == "system" else "change the messages"
            raise UserError(
                f"model '{self._model}': its chat template refuses messages with the roles {roles} ({error}); {fix}"
            ) from error
        return text

    def _template_end(self) -> int | None:
        """The special token that the template writes after an assistant's answer, if it writes one."""
        if self.tokenizer.chat_template is None:
            return None
        turns = [{"role": "user", "content": _PROBE}, {"role": "assistant", "content": _PROBE}]
        try:
            tail = self._templated(turns).rpartition(_PROBE)[2].lstrip()
        except UserError:
            return None
        ids = self.tokenizer(tail, add_special_tokens=False)["input_ids"]
        special = {token for token, added in self.tokenizer.added_tokens_decoder.items() if added.special}
        special |= set(self.tokenizer.all_special_ids)
        return ids[0] if ids and ids[0] in special else None


def load_encoder(model_path: str, system_prompt: str | None, trust_remote_code: bool = False) -> Encoder:
    """Encoder with the tokenizer of `model_path`; it pads with its end-of-sequence token if it has no other."""
    from transformers import AutoTokenizer

    with loading(model_path):
        tokenizer = AutoTokenizer.from_pretrained(model_path, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return Encoder(tokenizer, system_prompt, _model_ends(model_path))


def load_encoder_alone(model_path: str, system_prompt: str | None, trust_remote_code: bool = False) -> Encoder:
    """`load_encoder` for a Ray worker in which nothing else of transformers is used: without torch.

    A tokenizer with code of its own may need anything, and a process that is no Ray worker has other work too: there it
    is `load_encoder`.
    """
    if not trust_remote_code and is_ray_worker():
        leave_out_torch()
    return load_encoder(model_path, system_prompt, trust_remote_code)


def _model_ends(model_path: str) -> tuple[int, ...]:
    """End tokens that a model's `generation_config.json` names, or, without one, its `config.json`: as engines do.

    Only this field is read: transformers would ignore a damaged file, or one with an invalid field, and sampling would
        not stop.

    Raises:
        UserError: the file is damaged, or its `eos_token_id` is not a token.
    """
    from transformers.utils import cached_file

    missing = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    for name in ("generation_config.json", "config.json"):
        with loading(model_path):
            found = cached_file(model_path, name, **missing)
        if found is not None:
            return _ends_in(Path(found))
    return ()


def _ends_in(file: Path) -> tuple[int, ...]:
    tree = read_object(file, SAVE_AGAIN)
    inner = tree.get("text_config")
    ends = tree.get("eos_token_id", inner.get("eos_token_id") if isinstance(inner, dict) else None)
    listed = [] if ends is None else ends if isinstance(ends, list) else [ends]
    if not all(type(end) is int and 0 <= end < LARGEST_ID for end in listed):
        raise UserError(f"'{file}': eos_token_id {one_line(ends, 60)} is not a token or a list of tokens; {SAVE_AGAIN}")
    return tuple(listed)


def decode(encoder: Encoder, ids: Sequence[int]) -> str:
    """`Encoder.answer_text` without stop strings; kept for scripts that import it."""
    return encoder.answer_text(ids)
