"""The model class for lm-eval: converts its requests to tokens, and our answers to its format.

It tokenizes like lm-eval's own `hf` class, so that both make the same decisions: special tokens as the tokenizer adds
them unless the text begins with its BOS token, a context's trailing spaces moved to the continuation, longer inputs cut
from the left.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from lorapar_ray.datasets.chat import Encoder
from lorapar_ray.engines.requests import Answer, Request
from lorapar_ray.errors import UserError
from lorapar_ray.evaluation.serving import require_template

Ask = Callable[[Sequence[Request]], Sequence[Answer]]
MAX_GEN_TOKS = 256
"""Longest answer, in tokens, if a task sets no limit; lm-eval's own default."""
CHOICES_AT_ONCE = 64
"""Targets of one `choose` request; vLLM takes at most 128."""
PASSED_ON = frozenset({"temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "seed"})
"""Generation settings of a task that vLLM knows by the same name."""


class HarnessModel(TemplateLM):
    """An `lm_eval` model on top of a function that answers requests."""

    def __init__(
        self,
        ask: Ask,
        encoder: Encoder,
        max_model_len: int,
        *,
        max_gen_toks: int = MAX_GEN_TOKS,
        add_bos_token: bool | None = None,
    ) -> None:
        """Store the arguments.

        Args:
            ask: returns an answer to each request, in order.
            encoder: of the model's tokenizer and end tokens.
            max_model_len: tokens of a prompt and its continuation together.
            max_gen_toks: most tokens of an answer if a task sets no limit.
            add_bos_token: whether plain text begins with the tokenizer's special tokens; None: as it does by itself.
        """
        super().__init__()
        self.tokenizer = encoder.tokenizer
        self.max_length = max_model_len - 1  # vLLM generates one token after the scored ones
        self.max_gen_toks = max_gen_toks
        self.add_bos_token = add_bos_token
        self.cut = 0
        """Number of prompts that were cut at their beginning."""
        self._encoder = encoder
        self._ask = ask

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        eos = self.tokenizer.eos_token_id
        return self._encoder.end_id if eos is None else int(eos)

    @property
    def prefix_token_id(self) -> int:
        """The context for scoring a text without a context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's cache of prompts."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text; with its BOS token already written none is added."""
        special = self.add_bos_token if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            special = False
        ids: list[int] = self.tokenizer.encode(string, **({} if special is None else {"add_special_tokens": special}))
        return ids

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The tokenizer's template, for lm-eval's records.

        Raises:
            UserError: the model has none.
        """
        if chat_template:
            require_template(self.tokenizer)
        return super().chat_template(chat_template)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A prompt from the messages of a chat; without `add_generation_prompt` its last message is continued.

        Raises:
            UserError: the model has no template, or it refuses the messages.
        """
        from jinja2.exceptions import TemplateError

        require_template(self.tokenizer)
        try:
            text: str = self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in chat_history)
            raise UserError(
                f"model '{self.tokenizer.name_or_path}': its chat template refuses messages with the roles {roles} "
                f"({error}); leave the system prompt out, or evaluate without the template"
            ) from error
        return text

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability in nats, whether it is the greedy one) of each continuation; without its own progress
        bar."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """(log-probability of the continuation in nats, whether it is the greedy one) of each (key, context ids,
        continuation ids)."""
        plan = plan_scores([(context, continuation) for _, context, continuation in requests], self.max_length)
        self.cut += sum(len(context) + len(continuation) > self.max_length for _, context, continuation in requests)
        answers = {answer.key: answer for answer in self._ask(plan.requests)}
        found = []
        for (key, *_pair), (request, place) in zip(requests, plan.places, strict=True):
            answer = answers[plan.requests[request].key]
            part = slice(None) if place is None else slice(place, place + 1)
            result = sum(answer.logprobs[part]), all(answer.greedy[part])
            found.append(result)
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, result)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text in nats, in windows of at most the model's length."""
        windows: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for (text,) in (request.args for request in requests):
            own = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,  # and a token of context
                context_len=1,
            )
            disjoint = [make_disjoint_window(window) for window in own]
            windows += [(None, list(context), list(continuation)) for context, continuation in disjoint]
            counts.append(len(disjoint))
        scores = iter(self._loglikelihood_tokens(windows))
        totals = [sum(next(scores)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each context up to its first stop string, without it."""
        seen: Counter[tuple[str, str]] = Counter()
        planned, stops = [], []
        for context, settings in (request.args for request in requests):
            repeat = seen[context, repr(settings)]
            seen[context, repr(settings)] += 1
            request, stop = self._generation(context, settings, repeat)
            planned.append(request)
            stops.append(stop)
        texts = []
        for answer, stop, request in zip(self._ask(planned), stops, requests, strict=True):
            text = self.tokenizer.decode(list(answer.tokens), skip_special_tokens=True)
            texts.append(postprocess_generated_text(text, stop, None))
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        return texts

    def _generation(self, context: str, settings: Mapping[str, Any], repeat: int) -> tuple[Request, list[str]]:
        """A request, and the strings at which its text ends."""
        given: dict[str, Any] = dict(normalize_gen_kwargs(dict(settings), self.max_gen_toks))
        stop = handle_stop_sequences(given.pop("until", None), eos=self.tokenizer.decode(self.eot_token_id))
        most = int(given.pop("max_gen_toks"))
        given.pop("do_sample", None)
        if unknown := sorted(set(given) - PASSED_ON):
            raise UserError(
                f"generation_kwargs: '{unknown[0]}' is not known here; known are {', '.join(sorted(PASSED_ON))}"
            )
        room = self.max_length + 1 - most
        if room < 1:
            raise UserError(
                f"evaluate.engine.max_model_len: {self.max_length + 1} leaves no room for a prompt and answers of "
                f"{most} tokens; raise it, or lower max_gen_toks"
            )
        sampling = {
            "n": 1,
            "temperature": 0.0,
            **given,
            "max_tokens": most,
            "stop": [each for each in stop if each],
            "stop_token_ids": self._encoder.end_ids,
        }
        if sampling["temperature"] > 0.0:
            sampling["seed"] = int(sampling.get("seed") or 0) + repeat
        prompt = self.tok_encode(context)
        self.cut += len(prompt) > room
        return Request("generate", prompt[-room:], sampling=sampling, repeat=repeat), stop


class Plan:
    """Requests for the log-probabilities of continuations, and where each is in their answers."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.places: list[tuple[int, int | None]] = []
        """By continuation: index of its request, and of its token among the targets (None: all tokens count)."""


def plan_scores(pairs: Sequence[tuple[Sequence[int], Sequence[int]]], max_length: int) -> Plan:
    """The requests for the log-probability of each continuation after its context, both as token ids.

    Continuations of one token after the same context share a request. Inputs longer than `max_length` are cut from the
    left.

    Raises:
        UserError: a continuation alone is longer.
    """
    plan = Plan()
    singles: dict[tuple[int, ...], list[int]] = {}
    open_request: dict[tuple[int, ...], int] = {}
    for context, continuation in pairs:
        ids = [*context, *continuation][-max_length:]
        if len(continuation) >= max_length:
            raise UserError(
                f"evaluate.engine.max_model_len: a continuation of {len(continuation)} tokens and its context do not "
                f"fit into {max_length}; raise it"
            )
        if len(continuation) != 1:
            plan.places.append((len(plan.requests), None))
            plan.requests.append(Request("score", ids, start=len(ids) - len(continuation)))
            continue
        known, [target] = tuple(ids[:-1]), continuation
        targets = singles.get(known)
        if targets is None or (target not in targets and len(targets) == CHOICES_AT_ONCE):
            targets = singles[known] = []
            open_request[known] = len(plan.requests)
            plan.requests.append(Request("choose", known, targets=targets))
        if target not in targets:
            targets.append(target)
        plan.places.append((open_request[known], targets.index(target)))
    return plan
