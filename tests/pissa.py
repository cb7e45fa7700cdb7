"""A PiSSA adapter of the tiny student, as after training."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from lorapar_ray.adapters import adapter_parameters, attach_lora, save_adapter
from lorapar_ray.adapters.export import export_plain


def trained_pissa(student: Path, folder: Path, drift: float) -> Any:
    """The model on its residual base; writes the `adapter`, and as `plain` its export for the original base, into
    `folder`.

    Args:
        drift: simulated change by training, in standard deviations of each matrix.
    """
    base = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    model = attach_lora(base, rank=4, alpha=8, init="pissa")
    save_adapter(model, folder / "initial")
    with torch.no_grad():
        for number, parameter in enumerate(adapter_parameters(model).values()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.add_(drift * parameter.std() * noise)
    save_adapter(model, folder / "adapter")
    export_plain(folder / "initial", folder / "adapter", folder / "plain", str(student))
    return model
