"""Workers whose views of a shared file system differ: all resume from the checkpoint that rank 0 sees.

Fault injection: each rank gets a folder of its own as its view of the run, and in rank 1's some files are missing, come
late, or are newer than rank 0's. Workers are processes of a real process group.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.train
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from lorapar_ray.config import ScoreConfig, SftConfig
from lorapar_ray.datasets.tokens import Selection, write_tokens
from lorapar_ray.errors import UserError
from lorapar_ray.grpo import checkpoint as grpo_checkpoint
from lorapar_ray.importance import worker as scoring
from lorapar_ray.importance.worker import ScoreJob
from lorapar_ray.sft.arm import Worker
from lorapar_ray.sft.worker import SftJob, prepared
from lorapar_ray.storage import sight
from tests.unit.test_sft_files import checkpoint

WORLD = 2
STEPS = {
    # checkpoints that each rank sees at first; those that rank 1 sees later
    "late": ([50, 100], [50], [100]),
    "late and there was none": ([100], [], [100]),
    "rank 0's is older": ([50], [50, 100], []),
    "rank 0 sees none": ([], [50], []),
    "never": ([50, 100], [50], []),
}
EXPECTED = {"late": 100, "late and there was none": 100, "rank 0's is older": 50, "rank 0 sees none": None}


class Letters:
    """An encoder: a token per letter."""

    def examples(self, prompts: Any, responses: Any) -> list[tuple[list[int], int]]:
        return [([ord(each) for each in f"{prompt}{text}"], len(prompt)) for prompt, text in zip(prompts, responses)]  # noqa: B905


def tokens(path: Path) -> Path:
    rows = [{"id": str(each), "prompt": "one?", "response": "two", "system": 1} for each in range(4)]
    write_tokens([rows], Letters(), path, "key")  # type: ignore[arg-type]
    return path


def later(call: Callable[[], Any]) -> None:
    threading.Timer(0.3, call).start()


def resumed(rank: int, root: Path, case: str) -> Any:
    """The checkpoint that `prepared` chooses, by its name in this rank's folder; or the error."""
    first, second, more = STEPS[case]
    folder = root / f"view{rank}" / case
    folder.mkdir(parents=True)
    for step in (first, second)[rank]:
        checkpoint(folder, step, ranks=WORLD)
    dist.barrier()
    if rank == 1:
        later(
            lambda: [
                shutil.copytree(root / "view0" / case / f"checkpoint-{each}", folder / f"checkpoint-{each}")
                for each in more
            ]
        )
    selection = Selection(str(tokens(root / f"tokens{rank}-{case}")), [1], "sft.systems", 32)
    job = SftJob(
        "test", {}, {}, {}, "", "", "", asdict(selection), None, str(folder), str(folder / "sft.jsonl"), seed=0
    )
    settings = SftConfig(batch_size=2, micro_batch_size=1, report_to=[])
    try:
        found = prepared(job, settings, {"a": torch.ones(2)}, Worker(rank, WORLD, torch.device("cpu"))).resume_from
    except UserError as error:
        return str(error)
    assert found is None or Path(found).parent == folder
    return found and int(Path(found).name.split("-")[1])


def warmed_up(rank: int, root: Path, first: list[bool]) -> list[str]:
    """What `score_worker` does about the warm-up, where each rank sees the adapter at first or not."""
    adapter, seen = root / f"adapter-{first}-{rank}", []
    config = adapter / "adapter_config.json"
    adapter.mkdir()
    if first[rank]:
        config.touch()
    elif first[0]:
        later(config.touch)

    def warm_up(*_: Any) -> None:
        seen.append("warm-up")
        dist.barrier()
        config.touch()

    scoring._warm_up = warm_up  # type: ignore[assignment]
    settings = ScoreConfig().model_dump(mode="json")
    scoring.score_worker(ScoreJob({}, settings, "", str(adapter), {}, "", str(root / "phase"), {"a": "job"}).payload())
    return [*seen, "adapter" if config.is_file() else "no adapter"]


def newest(rank: int, root: Path) -> Any:
    """The step of stage 2's newest checkpoint."""
    folder = root / f"grpo{rank}"
    for step in (1, 2)[: WORLD - rank]:
        grpo_checkpoint.save(folder, step, {})
    dist.barrier()
    if rank == 1:
        later(lambda: grpo_checkpoint.save(folder, 2, {}))
    tree = grpo_checkpoint.newest(folder, rank, WORLD)
    return tree and tree["step"]


def worker(rank: int, root: Path) -> None:
    torch.set_num_threads(1)
    sight.LIMIT_S, sight.LOOK_EVERY_S = 5.0, 0.1
    context = SimpleNamespace(get_world_rank=lambda: rank, get_world_size=lambda: WORLD)
    ray.train.get_context = lambda: context  # type: ignore[assignment]
    dist.init_process_group("gloo", init_method=f"file://{root}/meet", rank=rank, world_size=WORLD)
    found: dict[str, Any] = {case: resumed(rank, root, case) for case in EXPECTED}
    found["newest"] = newest(rank, root)
    for first in ([True, False], [False, True], [False, False]):
        found[f"warm-up {first}"] = warmed_up(rank, root, first)
        dist.barrier()
    sight.LIMIT_S = 0.5
    found["never"] = resumed(rank, root, "never")
    torch.save(found, root / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Each rank's results."""
    root = tmp_path_factory.mktemp("views")
    start_processes(worker, (root,), nprocs=WORLD, start_method="forkserver")
    return [torch.load(root / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.slow
@pytest.mark.parametrize("case", EXPECTED)
def test_every_rank_resumes_from_the_checkpoint_that_rank_0_sees(case: str, found: list[dict[str, Any]]) -> None:
    assert [each[case] for each in found] == [EXPECTED[case]] * WORLD


@pytest.mark.slow
def test_a_checkpoint_that_a_rank_never_sees_is_named(found: list[dict[str, Any]]) -> None:
    assert found[0]["never"] == 100
    assert "checkpoint-100' is not there on" in found[1]["never"]
    assert "check that all nodes see the same run directory" in found[1]["never"]


@pytest.mark.slow
def test_stage_2_waits_for_the_checkpoint_that_rank_0_sees(found: list[dict[str, Any]]) -> None:
    assert [each["newest"] for each in found] == [2, 2]


@pytest.mark.slow
def test_every_rank_warms_up_or_none_does(found: list[dict[str, Any]]) -> None:
    for each in found:
        assert each["warm-up [True, False]"] == ["adapter"]
        assert each["warm-up [False, True]"] == each["warm-up [False, False]"] == ["warm-up", "adapter"]
