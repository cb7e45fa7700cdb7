"""Ranks that wait for one of them on the host, in two real processes."""

import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.multiprocessing.spawn import start_processes

from lorapar_ray.collectives import HostWait

WORLD, LATE_S = 2, 3.0


def wait(rank: int, root: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{root}/meet", rank=rank, world_size=WORLD)
    host = HostWait(WORLD)
    host.together()
    _set_pg_timeout(timedelta(seconds=LATE_S / 3), None)  # of the group for collectives
    if rank == 0:
        time.sleep(LATE_S)
        (Path(root) / "came").touch()
    host.together()
    assert (Path(root) / "came").exists()
    _set_pg_timeout(timedelta(seconds=600), None)
    host.together()
    total = torch.ones(1)
    dist.all_reduce(total)  # the group for collectives still works
    assert total == WORLD
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_wait_beyond_the_time_limit_of_collectives(tmp_path: Path) -> None:
    start_processes(wait, (str(tmp_path),), nprocs=WORLD, start_method="spawn")


def test_a_rank_alone_waits_for_nobody() -> None:
    HostWait(1).together()
