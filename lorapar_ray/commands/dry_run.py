"""`lorapar run --dry-run`: the resolved config, what would run, and the memory that it would need."""

from __future__ import annotations

from collections.abc import Sequence

from lorapar_ray.config import Config
from lorapar_ray.errors import UserError
from lorapar_ray.gpu_memory.device import device_of
from lorapar_ray.models import architecture, resolve_model
from lorapar_ray.pipeline import require_stages, stages_of
from lorapar_ray.plan import plan
from lorapar_ray.progress import console
from lorapar_ray.runs import RunDirectory
from lorapar_ray.text import shown


def show_plan(config: Config, run: RunDirectory, redo: Sequence[str]) -> None:
    """Print what `lorapar run` would do.

    Raises:
        UserError: `redo` names no stage of the run, or a process cannot fit into its GPU's memory.
    """
    require_stages(config, stages_of(config), redo)
    _require_shared_sequences(config)
    print(shown(config.to_yaml(hide_secrets=True)))
    console.print(f"run directory: {run.place}")
    for line in plan(config, run, redo):
        console.print(f"  {line}")
    _show_memory(config)


def _require_shared_sequences(config: Config) -> None:
    """Where this machine has the student: the run itself asks a worker."""
    model, ranks = config.model, config.grpo.sequence_parallel
    if "grpo" not in stages_of(config) or ranks == 1:
        return
    from lorapar_ray.sequence_parallel import require_shareable  # imports torch

    try:
        found = architecture(resolve_model(model.path), model.trust_remote_code)
    except UserError as error:
        console.print(f"grpo.sequence_parallel: not checked here: {error}")
    else:
        require_shareable(found, ranks)


def _show_memory(config: Config) -> None:
    """The run's memory use on its GPUs, if any."""
    device = device_of(config)
    if not device.count or config.adapter.method != "lora":
        return
    from lorapar_ray.gpu_memory import memory_lines, student_size  # imports torch

    try:
        size = student_size(config.model, config.adapter)
    except UserError as error:
        console.print(f"GPU memory: not estimated here: {error}")
        return
    console.print("GPU memory:")
    for line in memory_lines(config, stages_of(config), size, device):
        console.print(f"  {line}")
