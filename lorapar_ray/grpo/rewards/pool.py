"""Rewards in separate processes: one that raises, hangs or uses too much memory loses only its sample, never the
run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from lorapar_ray.config import SandboxConfig
from lorapar_ray.grpo.rewards.calling import NOT_FINITE
from lorapar_ray.grpo.rewards.code import CODE_TESTS, call_limit_s
from lorapar_ray.grpo.rewards.process import RewardProcess


@dataclass(frozen=True)
class RewardSpec:
    """A reward's name (see `get_reward`), its weight in the total, and whether it runs in the sandbox."""

    name: str
    weight: float = 1.0
    isolate: bool = False


@dataclass(frozen=True)
class RewardBatch:
    """Rewards of a batch of completions."""

    total: list[float]
    """Weighted sum of the parts; a failed part counts 0."""
    parts: dict[str, list[float | None]]
    """Values by reward; None if it failed, or does not apply."""
    failures: dict[str, int]
    """Samples lost by cause: `raised`, `timeout`, `crashed`, `not_finite`, `wrong_count`, and the name of a reward that
    is computed elsewhere."""
    failed: dict[str, int] = field(default_factory=dict)
    """Samples lost by reward."""
    errors: dict[str, str] = field(default_factory=dict)
    """Text of the first failure by reward; also of one that lost no sample."""


def with_part(
    scored: RewardBatch, name: str, weight: float, values: list[float | None], order: list[str], error: str = ""
) -> RewardBatch:
    """A batch with one more reward, computed elsewhere; sorts the parts by `order`.

    Args:
        error: the message for samples without a value; "": none, samples may lack a value.
    """
    failed, parts = sum(value is None for value in values), {**scored.parts, name: values}
    said = bool(failed and error)
    return RewardBatch(
        [total + weight * (value or 0.0) for total, value in zip(scored.total, values, strict=True)],
        {each: parts[each] for each in order if each in parts},
        scored.failures | ({name: failed} if failed else {}),
        scored.failed | ({name: failed} if said else {}),
        scored.errors | ({name: error} if said else {}),
    )


class RewardPool:
    """Scores batches in long-lived processes, one of them in the sandbox; each is replaced when a reward breaks it."""

    def __init__(
        self,
        specs: list[RewardSpec],
        *,
        time_limit_s: float,
        memory_limit_mb: int,
        sandbox: SandboxConfig | None = None,
        withheld: Collection[str] = (),
    ) -> None:
        """Start no process yet.

        Args:
            time_limit_s: for one call; a batch that takes longer is halved, a single sample is lost. `code_tests` has
                more if its programs may take longer, see `call_limit_s`.
            memory_limit_mb: of a process, without the programs of `code_tests`.
            withheld: environment variables hidden from rewards, in addition to those whose names mark them as secret.
        """
        self._specs = specs
        self._time_limit_s, self._sandbox = time_limit_s, sandbox or SandboxConfig()
        self._processes = {
            isolate: RewardProcess(
                [spec.name for spec in specs if spec.isolate == isolate],
                memory_limit_mb=memory_limit_mb,
                sandbox=self._sandbox,
                isolate=isolate,
                withheld=withheld,
            )
            for isolate in {spec.isolate for spec in specs}
        }

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def score(self, prompts: list[str], completions: list[str], columns: dict[str, list[Any]]) -> RewardBatch:
        """Every reward of every completion; `columns` are the rows' further fields, as TRL passes them.

        Raises:
            UserError: there is no such reward, or it cannot be imported here.
        """
        losses = _Losses()
        parts = {spec.name: self._part(spec, prompts, completions, columns, losses) for spec in self._specs}
        total = [
            sum(spec.weight * (parts[spec.name][index] or 0.0) for spec in self._specs)
            for index in range(len(completions))
        ]
        return RewardBatch(total, parts, dict(losses.causes), dict(losses.rewards), losses.errors)

    def close(self) -> None:
        """End the processes."""
        for process in self._processes.values():
            process.close()

    def _part(
        self,
        spec: RewardSpec,
        prompts: list[str],
        completions: list[str],
        columns: dict[str, list[Any]],
        losses: _Losses,
    ) -> list[float | None]:
        """One reward on a batch; a failing batch is halved until the failing samples are found.

        Without one value for each completion the whole batch is lost: nobody knows which values belong together, and a
        reward that means something else by its values would mean something else again on a part of the batch.
        """
        request = {"reward": spec.name, "prompts": prompts, "completions": completions, "columns": columns}
        reply = self._processes[spec.isolate].ask(request, len(completions), self._limit_s(spec, len(completions)))
        if reply.values is not None:
            losses.add(spec.name, "not_finite", "it returns no finite number", reply.values.count(NOT_FINITE))
            return [None if isinstance(value, str) else value for value in reply.values]
        if len(completions) == 1 or reply.cause == "wrong_count":
            losses.add(spec.name, reply.cause, reply.error, len(completions))
            return [None] * len(completions)
        before, middle = losses.rewards[spec.name], len(completions) // 2
        halves = []
        for part in (slice(None, middle), slice(middle, None)):
            fields = {key: value[part] for key, value in columns.items()}
            halves += self._part(spec, prompts[part], completions[part], fields, losses)
        if reply.cause == "raised" and losses.rewards[spec.name] == before:
            losses.note(spec.name, f"on {len(completions)} samples together, but on none of their parts: {reply.error}")
        return halves

    def _limit_s(self, spec: RewardSpec, count: int) -> float:
        if spec.name == CODE_TESTS:
            return call_limit_s(self._sandbox, count, self._time_limit_s)
        return self._time_limit_s


@dataclass
class _Losses:
    """What failed in a batch."""

    causes: Counter[str] = field(default_factory=Counter)
    rewards: Counter[str] = field(default_factory=Counter)
    errors: dict[str, str] = field(default_factory=dict)

    def add(self, reward: str, cause: str, text: str, samples: int) -> None:
        """Count lost samples."""
        if samples:
            self.causes[cause] += samples
            self.rewards[reward] += samples
            self.note(reward, text)

    def note(self, reward: str, text: str) -> None:
        """Keep the text of a reward's first failure."""
        self.errors.setdefault(reward, text)
