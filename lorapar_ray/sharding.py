"""Shards the frozen base over a group of workers (FSDP2); each reads only its share of the model's files.

For bases that do not fit one device. A layer's weights are gathered for its computation and freed afterwards, so every
worker must run the same number of forward and backward passes. The adapter is attached afterwards and is whole on each
worker.

`fsdp2` cuts over all workers. `hsdp` cuts over the workers of a node, and every node holds the whole base once: weights
are then gathered within a node, and the network between nodes carries only the adapter's gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorapar_ray.adapters import adapter_parameters, load_adapter
from lorapar_ray.boundary import open_tensors
from lorapar_ray.config import ModelConfig
from lorapar_ray.errors import UserError
from lorapar_ray.models import architecture, loading, model_folder, resolve_model
from lorapar_ray.precision import torch_dtype
from lorapar_ray.student import attention_of, device, load_base

SAVE_AGAIN = "check the model's files, or save it again"


def load_student(model: ModelConfig, path: str, adapter: Path, sharding: str) -> Any:
    """The base with a trainable adapter on this worker of a Ray Train group: whole (`none`), or its share of the base.

    Raises:
        UserError: as `load_base`, `load_adapter` and `load_sharded` do.
    """
    import ray.train

    if sharding == "none":
        return load_adapter(load_base(model, path, on=device()), adapter)
    return load_sharded(model, path, adapter, device(), sharding, ray.train.get_context().get_local_world_size())


def load_sharded(
    model: ModelConfig, path: str, adapter: Path, on: torch.device, sharding: str, ranks_on_node: int
) -> Any:
    """The base cut over the ranks of the process group, with a trainable adapter.

    Neither host nor device holds the whole base. Exceptions: if the files' weight names differ from the modules'
    (wrapped or converted models), or with `model.quantization`, each rank first reads the whole base into host memory.

    Args:
        on: device of this rank's share and of the adapter.
        sharding: `fsdp2` or `hsdp`.

    Raises:
        UserError: the model cannot be loaded, or nodes have different numbers of ranks (`hsdp`).
    """
    mesh = mesh_of(on, sharding, ranks_on_node)
    path = resolve_model(path)
    if model.quantization is None:
        student = load_adapter(_outline(model, path), adapter)
        if dict(_frozen(student)).keys() <= _names_in_files(path):
            return _filled(_cut(student, mesh, on), path)
    return _cut(load_adapter(load_base(model, path, on=torch.device("cpu")), adapter), mesh, on)


def mesh_of(on: torch.device, sharding: str, ranks_on_node: int) -> Any:
    """The ranks as FSDP2's mesh: one row, or a row for each node."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    world = dist.get_world_size()
    if sharding == "fsdp2":
        return init_device_mesh(on.type, (world,))
    counts: list[int] = [0] * world
    dist.all_gather_object(counts, ranks_on_node)
    require_even(counts)
    if ranks_on_node == world:
        return init_device_mesh(on.type, (world,))
    return init_device_mesh(on.type, (world // ranks_on_node, ranks_on_node), mesh_dim_names=("node", "shard"))


def require_even(counts: Sequence[int]) -> None:
    """Check that every node has the same number of workers.

    Args:
        counts: by rank, the workers on its node.

    Raises:
        UserError: it has not.
    """
    if len(set(counts)) > 1:
        raise UserError(
            f"sharding: hsdp needs as many workers on each node, and there are nodes with {min(counts)} and with "
            f"{max(counts)}; change the number of workers, or set sharding: fsdp2"
        )


def _outline(model: ModelConfig, path: str) -> Any:
    """The model with each parameter a single zero, expanded to its shape: it takes no memory until it is sharded. (On
    torch's `meta` device PEFT would leave the adapter without values too.)"""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config = architecture(path, model.trust_remote_code)
    with loading(path), init_empty_weights(include_buffers=False):
        base = AutoModelForCausalLM.from_config(
            config,
            dtype=torch_dtype(model.dtype, device()),
            attn_implementation=attention_of(model, device()),
            trust_remote_code=model.trust_remote_code,
        )
    base.tie_weights()  # without memory each name has a separate parameter
    _replace(base, lambda parameter: torch.zeros((), dtype=parameter.dtype).expand(parameter.shape))
    return base.eval()


def _frozen(student: Any) -> Iterator[tuple[str, Any]]:
    """The base's saved tensors by their names without an adapter; a tensor with several names appears once."""
    adapter = {id(parameter) for parameter in adapter_parameters(student).values()}
    seen: set[int] = set()
    for name, tensor in student.get_base_model().state_dict(keep_vars=True).items():
        if id(tensor) not in seen | adapter:
            seen.add(id(tensor))
            yield name.replace(".base_layer.", "."), tensor


def _names_in_files(path: str) -> set[str]:
    files = model_folder(path).glob("*.safetensors")
    return {name for file in files for name in open_tensors(file, SAVE_AGAIN).keys()}  # noqa: SIM118


def _cut(student: Any, mesh: Any, on: torch.device) -> Any:
    """Cut the base a decoder layer at a time, and move the adapter to `on`."""
    from torch.distributed.fsdp import fully_shard
    from transformers.modeling_layers import GradientCheckpointingLayer

    adapter = set(adapter_parameters(student).values())
    for parameter in adapter:
        parameter.data = parameter.data.to(on)
    base = student.get_base_model()
    for part in (*(each for each in base.modules() if isinstance(each, GradientCheckpointingLayer)), base):
        _replace(part, lambda parameter: torch.empty(parameter.shape, dtype=parameter.dtype, device=on), _is_outline)
        fully_shard(part, mesh=mesh, ignored_params=adapter)
    return student


def _is_outline(parameter: Tensor) -> bool:
    return parameter.untyped_storage().nbytes() < parameter.nbytes


def _replace(
    module: Any, made_of: Callable[[Tensor], Tensor], which: Callable[[Tensor], bool] = lambda _: True
) -> None:
    """Replace frozen parameters by other tensors; shared parameters stay shared."""
    made: dict[int, torch.nn.Parameter] = {}
    for each in module.modules():
        for name, parameter in list(each.named_parameters(recurse=False)):
            if id(parameter) in made or which(parameter):
                made.setdefault(id(parameter), torch.nn.Parameter(made_of(parameter), requires_grad=False))
                setattr(each, name, made[id(parameter)])


def _filled(student: Any, path: str) -> Any:
    """Read this rank's slices of the model's files."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    with loading(path):
        load(dict(_frozen(student)), storage_reader=HuggingFaceStorageReader(str(model_folder(path))))
    return student
