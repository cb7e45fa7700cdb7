"""LoRA on any decoder: targets, inits, files, export; and other PEFT methods for comparison."""

from lorapar_ray.adapters.attach import attach_lora, residual_base
from lorapar_ray.adapters.export import to_plain_lora
from lorapar_ray.adapters.keys import adapter_parameters, adapter_state
from lorapar_ray.adapters.merge import lora_scaling, merged_weights
from lorapar_ray.adapters.methods import attach_method, save_method
from lorapar_ray.adapters.store import load_adapter, read_adapter_state, save_adapter, write_adapter_state
from lorapar_ray.adapters.targets import layer_index, matrix, module_type, resolve_targets

__all__ = [
    "adapter_parameters",
    "adapter_state",
    "attach_lora",
    "attach_method",
    "layer_index",
    "load_adapter",
    "lora_scaling",
    "matrix",
    "merged_weights",
    "module_type",
    "read_adapter_state",
    "residual_base",
    "resolve_targets",
    "save_adapter",
    "save_method",
    "to_plain_lora",
    "write_adapter_state",
]
