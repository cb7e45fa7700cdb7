"""MaskedAdamW with DDP and FSDP2, compared with stock AdamW in one process with the whole batch."""

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import start_processes
from torch.nn.parallel import DistributedDataParallel

from lorapar_ray.optim import MaskedAdamW

WORLD, STEPS, MAX_NORM = 2, 4, 0.05
OPTIONS: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.1}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3))  # 9 and 3 rows cannot be halved evenly


def masks_of(model: nn.Module) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(p.shape, generator=generator) < 0.5 for p in model.parameters()]


def batch(step: int) -> torch.Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(step))


def loss_of(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    return model(rows).square().mean()


def expected() -> tuple[list[torch.Tensor], list[torch.Tensor], list[float]]:
    """(start, values, norms) of one process that masks by hand: zeroes gradients and restores inactive values."""
    model = network()
    start = [p.detach().clone() for p in model.parameters()]
    masks, norms = masks_of(model), []
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False, **OPTIONS)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, batch(step)).backward()
        for p, mask in zip(model.parameters(), masks, strict=True):
            assert p.grad is not None
            p.grad *= mask
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)))
        optimizer.step()
        with torch.no_grad():
            for p, mask, old in zip(model.parameters(), masks, start, strict=True):
                p.copy_(torch.where(mask, p, old))
    return start, [p.detach() for p in model.parameters()], norms


def worker(rank: int, root: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{root}/meet", rank=rank, world_size=WORLD)
    found = {how: train(how, rank) for how in ("ddp", "fsdp2")}
    if rank == 0:
        torch.save(found, root / "out.pt")
    dist.destroy_process_group()


def train(how: str, rank: int) -> dict[str, Any]:
    model: Any = network()
    masks = masks_of(model)
    if how == "ddp":
        model = DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (WORLD,))
        fully_shard(model[0], mesh=mesh)  # model[2] stays whole on every rank
        for p in model[2].parameters():
            p.register_hook(lambda gradient: _mean(gradient))
    optimizer = MaskedAdamW([{"params": list(model.parameters()), "masks": masks}], **OPTIONS)
    norms = []
    for step in range(STEPS):
        if step == STEPS // 2:  # resume half-way, each rank from its own state
            saved = optimizer.state_dict()
            optimizer = MaskedAdamW([{"params": list(model.parameters()), "masks": masks}], **OPTIONS)
            optimizer.load_state_dict(saved)
        optimizer.zero_grad()
        loss_of(model, batch(step)[rank::WORLD]).backward()
        norms.append(float(optimizer.clip_grad_norm_(MAX_NORM)))
        optimizer.step()
    whole = [p.full_tensor() if isinstance(p, DTensor) else p.data for p in model.parameters()]
    held = torch.tensor(optimizer.state_bytes()["moments"])
    dist.all_reduce(held)
    return {"values": [p.detach() for p in whole], "norms": norms, "bytes": int(held)}


def _mean(gradient: torch.Tensor) -> torch.Tensor:
    dist.all_reduce(gradient)
    return gradient / WORLD


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("ranks")
    multiprocessing.set_forkserver_preload([__name__])  # imported once for all ranks
    start_processes(worker, (root,), nprocs=WORLD, start_method="forkserver")
    loaded: dict[str, Any] = torch.load(root / "out.pt", weights_only=True)
    return loaded


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
@pytest.mark.slow
def test_shards_and_replicas_step_as_one_process_does(how: str, found: dict[str, Any]) -> None:
    start, values, norms = expected()
    masks = masks_of(network())
    assert found[how]["norms"] == pytest.approx(norms, rel=1e-5)
    for ours, theirs, old, mask in zip(found[how]["values"], values, start, masks, strict=True):
        assert torch.equal(ours[~mask], old[~mask])
        torch.testing.assert_close(ours[mask], theirs[mask], rtol=1e-5, atol=1e-6)
    copies = [1 if how == "fsdp2" and number < 2 else WORLD for number in range(len(masks))]  # the first layer is cut
    active = sum(count * int(mask.sum()) for count, mask in zip(copies, masks, strict=True))
    assert found[how]["bytes"] == 2 * 4 * active
