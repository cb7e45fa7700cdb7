"""Reads groups in the reward workers: fetches the record from the object store and decodes its completions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from lorapar_ray.datasets.chat import Encoder, load_encoder
from lorapar_ray.engines.record import read_record
from lorapar_ray.models import resolve_model

if TYPE_CHECKING:
    from lorapar_ray.config import GrpoConfig

REWARD_FIELDS = ("answer", "response", "messages", "columns")


@dataclass(frozen=True)
class Request:
    """A group to be rewarded: references and numbers only."""

    index: int
    """The prompt's index in the run's rows."""
    record: Any
    """Reference to the group's record."""
    step: int


@dataclass(frozen=True)
class Answers:
    """One prompt with the texts of its completions, as rewards take them.

    For an environment's trajectory the completion is the policy's last turn. Two columns have the whole: `trajectory`,
    a list of {role, content} with the roles assistant and environment, and `env_mask`, which has 1 for each sampled one
    of `completion_ids`.
    """

    prompts: list[str]
    completions: list[str]
    columns: dict[str, list[Any]]


class Reader:
    """Turns requests into the rewards' input, with the run's rows and tokenizer."""

    def __init__(self, plan: dict[str, Any], settings: GrpoConfig, load: Callable[..., Encoder] = load_encoder) -> None:
        """`plan`: see `Coordinator`; uses `rows`, `steps`, `model` and `trust_remote_code`."""
        self._rows: Sequence[dict[str, Any]] = plan["rows"]
        self._steps: int = plan["steps"]
        self._stop = list(settings.stop)
        self._encoder: Encoder = load(resolve_model(plan["model"]), None, plan["trust_remote_code"])

    def read(self, request: Request) -> Answers | None:
        """None: the record is lost with the node that held it."""
        record = read_record(request.record)
        if record is None:
            return None
        ids, masks = [tokens.tolist() for tokens, _ in record.completions()], record.masks()
        row, count = self._rows[request.index], len(ids)
        columns: dict[str, list[Any]] = {key: [row[key]] * count for key in REWARD_FIELDS if key in row}
        columns["completion_ids"] = ids
        columns["trainer_state"] = [{"global_step": request.step, "max_steps": self._steps}] * count
        if record.sampled is None:
            texts = [self._encoder.answer_text(each, self._stop) for each in ids]
        else:
            runs = [
                list(runs_of(each, mask.tolist())) for each, mask in zip(ids, masks, strict=True) if mask is not None
            ]
            texts = [self._encoder.answer_text(tokens[-1][1], self._stop) for tokens in runs]
            columns["env_mask"] = [mask.astype(int).tolist() for mask in masks if mask is not None]
            columns["trajectory"] = [[self._said(*run) for run in each] for each in runs]
        return Answers([row["prompt"]] * count, texts, columns)

    def _said(self, sampled: bool, tokens: list[int]) -> dict[str, str]:
        text = self._encoder.tokenizer.decode(tokens, skip_special_tokens=True)
        return {"role": "assistant" if sampled else "environment", "content": text}


def runs_of(ids: Sequence[int], sampled: Sequence[bool]) -> Iterator[tuple[bool, list[int]]]:
    """The trajectory in parts of consecutive tokens, either sampled by the policy or added by the environment."""
    for own, run in groupby(zip(sampled, ids, strict=True), key=lambda pair: bool(pair[0])):
        yield own, [token for _, token in run]
