"""The evaluated model and how engines serve it: a base, or a base with a stock LoRA adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lorapar_ray.adapters import read_adapter_state
from lorapar_ray.adapters.given import require_lora
from lorapar_ray.boundary import read_object
from lorapar_ray.engines.policy import Policy, read_policy
from lorapar_ray.engines.requests import Answer, Request
from lorapar_ray.errors import UserError
from lorapar_ray.evaluation.answers import AnswerStore
from lorapar_ray.evaluation.engines import Engines
from lorapar_ray.files import expanded
from lorapar_ray.mergeable import unmergeable
from lorapar_ray.models import model_reference, resolve_model
from lorapar_ray.workers import where_models_are

Serve = Literal["auto", "merged", "adapter"]


@dataclass(frozen=True)
class NamedModel:
    """What a user named."""

    base: str
    """Its reference for workers (see `models.model_reference`)."""
    adapter: Path | None
    """A stock PEFT LoRA for that base."""


def named_model(text: str, where: str = "--model") -> NamedModel:
    """`DIR`, `HUB/NAME`, `package:NAME`, `BASE+ADAPTER`, or the directory of an adapter that names its base.

    The base of an adapter trained on a PiSSA residual is that residual base's directory.

    Raises:
        UserError: there is no such model or adapter, or the adapter is not a plain LoRA.
    """
    whole = expanded(text)
    if whole.is_dir() and (whole / "adapter_config.json").is_file():
        named = read_object(whole / "adapter_config.json", "save the adapter again").get("base_model_name_or_path")
        if not isinstance(named, str) or not named:
            raise UserError(f"{where}: the adapter '{text}' does not name its base; write BASE+{text}")
        base, adapter = named, text
    elif "+" in text and not whole.is_dir():
        base, _, adapter = text.rpartition("+")
    else:
        resolve_model(text)
        return NamedModel(model_reference(text), None)
    folder = expanded(adapter)
    require_lora(folder, where)
    resolve_model(base)
    return NamedModel(model_reference(base), folder.resolve())


def serving(model: str, adapters: Iterable[Path | None], wanted: Serve = "auto") -> dict[str, Any]:
    """How engines are to serve the adapters: arguments `sync` and `max_lora_rank` of `Engines`.

    `auto` is `merged`, or LoRA if the base's files use other names for the adapted weights.

    Raises:
        UserError: `merged` is requested but not possible.
    """
    states = [read_adapter_state(folder) for folder in adapters if folder is not None]
    apart = where_models_are(unmergeable, model, sorted({key for state in states for key in state})) if states else []
    if wanted == "merged" and apart:
        raise UserError(
            f"evaluate.serve: merged needs '{apart[0]}' in the files of '{model}', which use another name; set adapter"
        )
    if not states or wanted == "merged" or (wanted == "auto" and not apart):
        return {"sync": "merged"}
    ranks = [len(value) for state in states for key, value in state.items() if ".lora_A." in key]
    return {"sync": "adapter", "max_lora_rank": max(ranks)}


def require_template(tokenizer: Any) -> None:
    """Check that a model can be asked through a chat template.

    Raises:
        UserError: it has none.
    """
    if tokenizer.chat_template is None:
        raise UserError(
            f"model '{tokenizer.name_or_path}': has no chat template; evaluate it without one (evaluate.chat: false), "
            "or give an instruction-tuned model"
        )


class Served:
    """One model on running engines: returns answers, and saves them."""

    def __init__(self, engines: Engines, adapter: Path | None, store: AnswerStore | None = None) -> None:
        """`store`: saved answers for a later process; None: answers are not saved."""
        self._engines = engines
        self._policy: Policy | None = None if adapter is None else read_policy(adapter, 0)
        self._store = store

    def answers(self, requests: Sequence[Request], count: Callable[[int], None] = lambda _: None) -> list[Answer]:
        """An answer to each request, in order.

        Args:
            count: called regularly with the number of answered requests.

        Raises:
            UserError: the engines cannot answer; what came before is kept.
        """
        store = AnswerStore(None) if self._store is None else self._store
        missing = store.missing(requests)
        left = len(missing)
        count(len(requests) - left)
        for found in self._engines.answers(missing, self._policy):
            store.add(found)
            left -= len(found)
            count(len(requests) - left)
        return [store[request.key] for request in requests]
