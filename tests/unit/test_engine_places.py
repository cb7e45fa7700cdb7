"""How long stage 2 waits for its engines' places, on a simulated cluster."""

from __future__ import annotations

from typing import Any

import pytest

from lorapar_ray.config import Config
from lorapar_ray.errors import UserError
from lorapar_ray.grpo.placement import wait_for_places


class Group:
    """A placement group that gets its places at the last of some looks."""

    def __init__(self, looks: int) -> None:
        self.looks = looks

    def wait(self, timeout_seconds: float) -> bool:
        assert timeout_seconds <= 5
        self.looks -= 1
        return self.looks == 0


def said_while_waiting(capsys: pytest.CaptureFixture[str], **cluster: Any) -> str:
    tree = {"name": "x", "model": {"path": "m"}, "data": {"train": [{"reader": "file", "path": "rows.jsonl"}]}}
    wait_for_places(Group(4), Config.model_validate({**tree, "cluster": {"wait_s": 1e-9, **cluster}}))
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("limit", ["max_cpus", "max_gpus"])
def test_on_a_cluster_that_may_grow_engines_wait_without_limit(limit: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = said_while_waiting(capsys, **{limit: 8})
    assert said == "grpo waits for room for 1 rollout engines of {'CPU': 1.0}, each on a single node"


def test_on_another_cluster_they_wait_for_their_limit(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"grpo: no room for 1 rollout engines .* within 1e-09 s; lower grpo"):
        said_while_waiting(capsys)
    said = said_while_waiting(capsys, wait_s=600)
    assert said.startswith("grpo waits up to 600 s for room for 1 rollout engines")
