"""A base sharded over ranks, each reading only its slices of the files, computes the same as the whole base."""

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import start_processes
from transformers import LlamaConfig, LlamaForCausalLM

from lorapar_ray import sharding as module
from lorapar_ray.adapters import attach_lora, load_adapter, save_adapter
from lorapar_ray.collectives import HostWait, most_of_any_rank, sum_over_ranks
from lorapar_ray.config import ModelConfig
from lorapar_ray.errors import UserError
from lorapar_ray.sharding import load_sharded, require_even

WORLD, NODES = 4, 2
IDS = torch.arange(12).view(2, 6)
WAYS = ("fsdp2", "hsdp", "renamed")


def student(folder: Path, *, tied: bool) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,  # not a multiple of the ranks
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


def of(folder: Path) -> ModelConfig:
    return ModelConfig(path=str(folder), dtype="float32", attention="eager")


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """Logits, and gradients of the adapter."""
    logits = model(input_ids=IDS.to(next(each.device for each in model.parameters() if each.requires_grad))).logits
    logits.square().mean().backward()
    return {
        "logits": logits.detach(),
        **{name: each.grad for name, each in model.named_parameters() if each.grad is not None},
    }


def watch(output: torch.Tensor, model: Any, seen: list[int]) -> None:
    """Note which part of the base outside of its layers is whole when the backward pass reaches `output`."""
    base = model.get_base_model()
    outside = {
        id(each): each
        for part in (base.model.embed_tokens, base.model.norm, base.lm_head)
        for each in part.parameters()
    }
    output.register_hook(
        lambda _: seen.append(sum(each.numel() for each in outside.values() if not isinstance(each, DTensor)))
    )


whole_base = module.load_base


def refused(*_: Any, **__: Any) -> None:
    raise AssertionError("a rank reads the whole base")


def worker(rank: int, root: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{root}/meet", rank=rank, world_size=WORLD)
    found: dict[str, Any] = {}
    for kind in ("tied", "untied"):
        for way in WAYS:
            folder = root / (f"{kind}-renamed" if way == "renamed" else kind)
            sharding = "fsdp2" if way == "renamed" else way
            module.load_base = whole_base if way == "renamed" else refused  # type: ignore[assignment]
            where, adapter = torch.device("cpu"), root / f"{kind}-adapter"
            model = load_sharded(of(folder), str(folder), adapter, where, sharding, WORLD // NODES).eval()
            held = sum(each.to_local().numel() for each in model.parameters() if isinstance(each, DTensor))
            gathered: list[int] = []
            first = model.get_base_model().model.layers[0]
            first.register_forward_hook(lambda _, __, output, model=model, seen=gathered: watch(output, model, seen))
            seen = gradients(model)
            found[f"{kind}/{way}"] = {"held": held, "seen": seen, "gathered": gathered}
    torch.save(found, root / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each rank's results, in a folder with the models."""
    folder = tmp_path_factory.mktemp("sharding")
    for kind in ("tied", "untied"):
        student(folder / kind, tied=kind == "tied")
        base = LlamaForCausalLM.from_pretrained(folder / kind, dtype=torch.float32)
        model = attach_lora(base, rank=2, alpha=4, targets="qkvgud", init="gaussian", seed=0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter.data, std=0.1)
        save_adapter(model, folder / f"{kind}-adapter")
        renamed(folder / kind, folder / f"{kind}-renamed")
    multiprocessing.set_forkserver_preload([__name__])  # imported once for all ranks
    start_processes(worker, (folder,), nprocs=WORLD, start_method="forkserver")
    return folder


def renamed(model: Path, target: Path) -> None:
    """A checkpoint with older names, which transformers still reads."""
    from safetensors.torch import save_file

    target.mkdir()
    (target / "config.json").write_text((model / "config.json").read_text())
    tensors = load_file(model / "model.safetensors")
    save_file(
        {name.removeprefix("model."): value for name, value in tensors.items()},
        target / "model.safetensors",
        metadata={"format": "pt"},
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["tied", "untied"])
@pytest.mark.slow
def test_a_cut_base_computes_what_the_whole_one_does(kind: str, way: str, root: Path) -> None:
    whole = LlamaForCausalLM.from_pretrained(root / kind, dtype=torch.float32, attn_implementation="eager")
    expected = gradients(load_adapter(whole, root / f"{kind}-adapter").eval())
    assert len(expected) > 20
    for rank in range(WORLD):
        seen = torch.load(root / f"{rank}.pt", weights_only=True)[f"{kind}/{way}"]["seen"]
        assert seen.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(seen[name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.slow
def test_ranks_hold_a_share_of_the_base_and_each_node_of_hsdp_holds_all(root: Path) -> None:
    found = [torch.load(root / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]
    every = sum(each.numel() for each in LlamaForCausalLM.from_pretrained(root / "untied").parameters())
    held = {way: [rank[f"untied/{way}"]["held"] for rank in found] for way in WAYS}
    assert sum(held["fsdp2"]) == sum(held["renamed"]) == every
    assert sum(held["hsdp"][: WORLD // NODES]) == sum(held["hsdp"][WORLD // NODES :]) == every
    assert max(held["hsdp"]) < every


@pytest.mark.slow
def test_embeddings_and_head_stay_gathered_until_the_backward_pass_ends(root: Path) -> None:
    """`gpu_memory.needs` counts them whole."""
    for rank in range(WORLD):
        found = torch.load(root / f"{rank}.pt", weights_only=True)
        for kind, tables in (("tied", 1), ("untied", 2)):
            for way in WAYS:
                assert found[f"{kind}/{way}"]["gathered"] == [tables * 50 * 16 + 16]


def alone(_: int, root: Path, device: str, backend: str) -> None:
    """A group of one rank, with the collectives that a step makes."""
    dist.init_process_group(backend, init_method=f"file://{root}/meet-alone", rank=0, world_size=1)
    where = torch.device(device)
    model = load_sharded(of(root / "untied"), str(root / "untied"), root / "untied-adapter", where, "fsdp2", 1).eval()
    assert any(isinstance(each, DTensor) for each in model.parameters())
    seen = gradients(model)
    sum_over_ranks([each.grad for each in model.parameters() if each.grad is not None])
    assert most_of_any_rank(3, where) == 3
    HostWait(2).together()  # also where the group for collectives is NCCL's
    torch.save({name: value.cpu() for name, value in seen.items()}, root / f"alone-{device}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(("device", "backend"), [("cpu", "gloo"), pytest.param("cuda", "nccl", marks=pytest.mark.gpu)])
@pytest.mark.slow
def test_a_group_of_one_rank_computes_what_the_whole_base_does(device: str, backend: str, tmp_path: Path) -> None:
    base = LlamaForCausalLM.from_pretrained(student(tmp_path / "untied", tied=False), dtype=torch.float32)
    model = attach_lora(base, rank=2, alpha=4, targets="qkvgud", init="gaussian", seed=0)
    save_adapter(model, tmp_path / "untied-adapter")
    whole = LlamaForCausalLM.from_pretrained(tmp_path / "untied", dtype=torch.float32, attn_implementation="eager")
    expected = gradients(load_adapter(whole, tmp_path / "untied-adapter").eval())
    multiprocessing.set_forkserver_preload([__name__])
    start_processes(alone, (tmp_path, device, backend), nprocs=1, start_method="forkserver")
    seen = torch.load(tmp_path / f"alone-{device}.pt", weights_only=True)
    assert seen.keys() == expected.keys()
    tolerance = {"cpu": 1e-6, "cuda": 1e-4}[device]
    for name, value in expected.items():
        torch.testing.assert_close(seen[name], value, rtol=10 * tolerance, atol=tolerance, msg=name)


def test_uneven_nodes_are_refused() -> None:
    with pytest.raises(UserError, match=r"hsdp needs as many workers on each node.* with 1 and with 3"):
        require_even([3, 3, 3, 1])
