"""Loads a policy in place into vLLM's Llama in a GPU's layout, with weights that are not repacked."""

from pathlib import Path
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype

from lorapar_ray.adapters import merged_weights
from lorapar_ray.engines.base_weights import BaseWeights
from lorapar_ray.engines.weight_loading import has_checkpoint_layout, load_in_place, modules_of


def loaded_in_place(folder: Path, meet: Path) -> dict[str, Any]:
    """What was found in a process that has no engine yet.

    Args:
        folder: the model.
        meet: a file that does not exist, for vLLM's process group.
    """
    dtype = torch.bfloat16
    settings = EngineArgs(
        model=str(folder), dtype="bfloat16", enforce_eager=True, max_model_len=64
    ).create_engine_config()
    with set_current_vllm_config(settings), set_default_torch_dtype(dtype):
        init_distributed_environment(1, 0, f"file://{meet}", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        model = initialize_model(vllm_config=settings)
        base = BaseWeights(folder)
        model.load_weights((name, base[name]) for name in base)
        names = [name for name in base if "_proj" in name and "o_proj" not in name]
        adapter = {}
        for name in names:
            out, into = base[name].shape
            key = f"base_model.model.{name.removesuffix('.weight')}"
            adapter[f"{key}.lora_A.weight"] = 0.1 * torch.randn(4, into, dtype=torch.float32)
            adapter[f"{key}.lora_B.weight"] = 0.1 * torch.randn(out, 4, dtype=torch.float32)
        merged = dict(merged_weights(base, adapter, scaling=2.0, dtype=dtype))
        places = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
        load_in_place(model, iter(merged.items()), whole=True)
        attention = model.model.layers[1].self_attn.qkv_proj.weight
        stacked = torch.cat([merged[f"model.layers.1.self_attn.{part}_proj.weight"] for part in "qkv"])
        try:
            load_in_place(model, ((name, merged[name]) for name in names if "k_proj" not in name), whole=True)
            refused = ""
        except ValueError as error:
            refused = str(error)
        return {
            "plain on a GPU": has_checkpoint_layout(model, torch.device("cuda")),
            "plain on a CPU": has_checkpoint_layout(model, torch.device("cpu")),
            "same storage": places == {name: each.data_ptr() for name, each in model.named_parameters()},
            "merged": torch.equal(attention, stacked),
            "modules": sorted(modules_of(model, names)),
            "a part is missing": refused,
        }
