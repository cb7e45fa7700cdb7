"""The plan's lines about GPU memory; refuses what cannot fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lorapar_ray.config import Config
from lorapar_ray.errors import UserError
from lorapar_ray.gpu_memory.device import GIB, Device
from lorapar_ray.gpu_memory.needs import Need, needs_of
from lorapar_ray.gpu_memory.student import StudentSize
from lorapar_ray.gpus import place

ADVICE = {
    "worker": "lower the tokens of a pass (score.batch_tokens, sft.micro_batch_size), set gradient_checkpointing, or "
    "model.quantization: nf4",
    "learner": "remove grpo.gradient_checkpointing, set model.quantization: nf4, let several learners share a sequence "
    "(grpo.sequence_parallel), or give learners more of the GPU",
    "engine": "lower max_model_len or max_num_seqs, or give the engine more of the GPU (tensor_parallel for several)",
}


def memory_lines(config: Config, stages: Sequence[str], size: StudentSize, device: Device) -> Iterator[str]:
    """A line per kind of process: the memory of one process, by purpose.

    Raises:
        UserError: one of them cannot fit its part of a GPU; raised after the lines.
    """
    refused = ""
    for stage in stages:
        for need in needs_of(place(config, stage, device.count), stage, size):
            yield f"{stage:<10} {_line(need, device)}"
            if not refused and device.bytes is not None and need.bytes > need.share * device.bytes:
                refused = _refusal(stage, need, device.bytes)
    if refused:
        raise UserError(refused)


def _line(need: Need, device: Device) -> str:
    parts = ", ".join(f"{what} {amount / GIB:.1f}" for what, amount in need.parts.items() if amount >= 0.05 * GIB)
    share = "a GPU" if need.share == 1 else f"{need.share:g} of a GPU"
    room = "" if device.bytes is None else f" ({need.share * device.bytes / GIB:.1f})"
    return f"{need.count} × {need.process}: at least {need.bytes / GIB:.1f} GiB of {share}{room}: {parts}"


def _refusal(stage: str, need: Need, memory: float) -> str:
    largest = max(need.parts, key=lambda what: need.parts[what])
    return (
        f"{stage}: a {need.process} takes at least {need.bytes / GIB:.1f} GiB ({largest} "
        f"{need.parts[largest] / GIB:.1f}) and has {need.share * memory / GIB:.1f} GiB of a GPU; "
        + ADVICE[need.process.rpartition(" ")[2]]
    )
