"""What a stage asks the cluster for, as numbers and in words."""

import pytest

from lorapar_ray.config import Config
from lorapar_ray.pipeline import PIPELINE
from tests.unit.test_gpus import config

UNMASKED = {"sft": {"masked": False}, "grpo": {"masked": False}}


@pytest.mark.parametrize(
    ("tree", "workers", "words"),
    [
        (config(score={"workers": 4}), {"workers": 4}, "4 × worker (1 CPU + GPU auto); GPU auto: one each, "),
        (config(score={"workers": 4}, **UNMASKED), {"workers": 1}, "1 × worker (1 CPU + GPU auto); GPU auto: "),
        (config(score={"workers": 4}, sft={"masked": False}, order=["sft"], adapter={"method": "ia3"}), {}, ""),
    ],
)
def test_scoring_without_scores_asks_for_the_worker_that_makes_the_adapter(
    tree: Config, workers: dict[str, int], words: str
) -> None:
    stage = PIPELINE["score"]
    assert {name: count for name, (count, _) in stage.groups(tree).items()} == workers
    assert stage.resources(tree).startswith(words) and bool(stage.resources(tree)) == bool(words)


def test_labels_without_votes_ask_for_nothing() -> None:
    tree = config(label={"strategy": "random", "teachers": []})
    assert (PIPELINE["label"].groups(tree), PIPELINE["label"].resources(tree)) == ({}, "")
