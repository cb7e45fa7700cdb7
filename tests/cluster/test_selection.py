"""θ selection by Ray tasks equals that of one process, including ties."""

from itertools import chain
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorapar_ray.adapters.targets import module_type
from lorapar_ray.errors import UserError
from lorapar_ray.partition import keep_top
from lorapar_ray.partition.distributed import select_on_cluster, split_keys
from lorapar_ray.partition.passes import GroupOf, whole_adapter
from tests.unit.partition_scores import Scores, skewed

pytestmark = pytest.mark.cluster


@pytest.fixture
def scores() -> Scores:
    """Scores rounded so coarsely that most elements are tied."""
    return {key: (value * 4).round() for key, value in skewed(seed=0, layers=3).items()}


def save_shards(scores: Scores, folder: Path, count: int) -> list[Path]:
    keys = sorted(scores)
    paths = [folder / f"scores-{number}.safetensors" for number in range(count)]
    for number, path in enumerate(paths):
        save_file({key: scores[key] for key in keys[number::count]}, path)
    return paths


@pytest.mark.parametrize("tasks", [1, 3, 50])
@pytest.mark.parametrize("group_of", [whole_adapter, module_type])
@pytest.mark.parametrize("theta", [0.3, 0.9])
def test_tasks_keep_the_same_set(
    cluster: None, scores: Scores, tmp_path: Path, tasks: int, group_of: GroupOf, theta: float
) -> None:
    paths = save_shards(scores, tmp_path, 2)
    cuts = select_on_cluster(paths, theta, tmp_path / "masks", tasks=tasks, group_of=group_of)
    masks = {k: v for path in sorted((tmp_path / "masks").iterdir()) for k, v in load_file(path).items()}
    expected = keep_top(scores, theta, group_of=group_of)
    assert masks.keys() == expected.keys()
    assert all(torch.equal(masks[key], expected[key]) for key in expected)
    assert any(cut.ties_kept > 1 for cut in cuts.values())


def test_a_bad_score_is_named_across_the_cluster(cluster: None, scores: Scores, tmp_path: Path) -> None:
    key = sorted(scores)[5]
    scores[key][0, 0] = float("nan")
    with pytest.raises(UserError, match=f"'{key}'"):
        select_on_cluster(save_shards(scores, tmp_path, 2), 0.9, tmp_path / "masks", tasks=2)


def test_runs_of_keys_are_even_and_complete() -> None:
    scores = {f"k{number:02d}": torch.zeros(10) for number in range(30)}
    runs = split_keys(scores, 4)
    assert list(chain.from_iterable(runs)) == sorted(scores)
    assert [len(run) for run in runs] == [7, 8, 7, 8]
    assert split_keys({}, 4) == []
