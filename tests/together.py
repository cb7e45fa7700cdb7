"""Ray Train jobs in one group of workers, and tasks in this process: a process starts longer than a small job runs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from lorapar_ray.workers import run_workers


class _Later(Exception):
    """Raised to stop a stage where it would start its own group."""


@contextmanager
def tasks_here() -> Iterator[None]:
    """Tokenise rows and make adapters in this process while the block runs."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("lorapar_ray.datasets.labelled", "lorapar_ray.adapters.job"):
            patch.setattr(f"{module}.on_a_worker", lambda function, *arguments, **_: function(*arguments))
        yield


def run_together(modules: Sequence[str], stages: Sequence[Callable[[], Any]]) -> None:
    """Run stages that each start a group of the same size: run all their jobs in one group, then the rest of each
    stage.

    Args:
        modules: the modules in which the stages find `run_workers`.
        stages: each calls `run_workers` once, or not at all if its results exist.
    """
    jobs: list[tuple[Any, ...]] = []
    groups: list[dict[str, Any]] = []

    def put_off(function: Any, argument: Any, **group: Any) -> None:
        jobs.append((function, argument))
        groups.append(group)
        raise _Later

    with pytest.MonkeyPatch.context() as patch:
        for module in modules:
            patch.setattr(f"{module}.run_workers", put_off)
        for stage in stages:
            with suppress(_Later):
                stage()
        run_in_one_group(jobs, groups)
        for module in modules:
            patch.setattr(f"{module}.run_workers", lambda *_, **__: None)
        for stage in stages:
            stage()


def run_in_one_group(jobs: Sequence[tuple[Any, ...]], groups: Sequence[dict[str, Any]]) -> None:
    """The jobs (function, argument), one after the other, in one group; all need the same number of workers."""
    assert len({(group["workers"], str(group["resources"])) for group in groups}) == 1
    run_workers(_one_after_another, {"jobs": list(jobs)}, **groups[0])


def _one_after_another(payload: dict[str, Any]) -> None:
    for function, argument in payload["jobs"]:
        function(argument)
