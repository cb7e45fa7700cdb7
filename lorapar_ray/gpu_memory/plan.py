"""The plan's lines about GPU memory; refuses what certainly does not fit, and warns of what may not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from lorapar_ray.config import Config
from lorapar_ray.errors import UserError
from lorapar_ray.gpu_memory.device import GIB, Device
from lorapar_ray.gpu_memory.needs import Need, needs_of
from lorapar_ray.gpu_memory.student import StudentSize
from lorapar_ray.gpus import place

LESS = {
    "worker": "set model.quantization: nf4, lower adapter.rank, or cut the base over more workers (sharding: fsdp2)",
    "learner": "set model.quantization: nf4, lower adapter.rank, cut the base over more learners (grpo.sharding), or "
    "give learners more of the GPU",
    "engine": "lower max_model_len or max_num_seqs, or give the engine more of the GPU (tensor_parallel for several)",
}
"""By kind of process, what makes its certain part smaller."""
SHORTER = {
    "worker": "lower the tokens of a pass (score.batch_tokens, sft.micro_batch_size) or set gradient_checkpointing",
    "learner": "remove grpo.gradient_checkpointing, or let several learners share a sequence (grpo.sequence_parallel)",
}
"""The same for what depends on the rows."""


def memory_lines(config: Config, stages: Sequence[str], size: StudentSize, device: Device) -> Iterator[str]:
    """A line per kind of process: the memory of one process, by purpose.

    Raises:
        UserError: the certain part of one of them does not fit its part of a GPU, or an engine fills more than its
            share; raised after the lines.
    """
    refused = ""
    for stage in stages:
        for need in needs_of(place(config, stage, device.count), stage, size):
            yield f"{stage:<10} {_line(need, device)}"
            if not refused and need.fills > need.share:
                refused = _too_large_a_part(stage, need)
            if not refused and device.bytes is not None and need.bytes > need.fills * device.bytes:
                refused = _refusal(stage, need, device.bytes)
    if refused:
        raise UserError(refused)


def _line(need: Need, device: Device) -> str:
    share = "a GPU" if need.share == 1 else f"{need.share:g} of a GPU"
    room = None if device.bytes is None else need.fills * device.bytes
    told = "" if room is None else f" ({'' if need.fills == need.share else 'it fills '}{room / GIB:.1f})"
    line = f"{need.count} × {need.process}: at least {need.bytes / GIB:.1f} GiB of {share}{told}: {_shown(need.parts)}"
    if not need.more:
        return line
    line += f"; in the fullest pass up to {need.most / GIB:.1f}: {_shown(need.more)}"
    if room is not None and need.bytes <= room < need.most:
        line += f"; if that does not fit, {SHORTER[_kind(need)]}"
    return line


def _shown(parts: Mapping[str, float]) -> str:
    return ", ".join(f"{what} {amount / GIB:.1f}" for what, amount in parts.items() if amount >= 0.05 * GIB)


def _kind(need: Need) -> str:
    return need.process.rpartition(" ")[2]


def _too_large_a_part(stage: str, need: Need) -> str:
    return (
        f"{stage}: {_named(need)} has {need.share:g} of a GPU and its extra.gpu_memory_utilization fills "
        f"{need.fills:g} of it, which others need; remove that setting, or give the engine a whole GPU"
    )


def _named(need: Need) -> str:
    return f"{'an' if need.process[0] in 'aeiou' else 'a'} {need.process}"


def _refusal(stage: str, need: Need, memory: float) -> str:
    largest = max(need.parts, key=lambda what: need.parts[what])
    return (
        f"{stage}: {_named(need)} takes at least {need.bytes / GIB:.1f} GiB ({largest} "
        f"{need.parts[largest] / GIB:.1f}) and has {need.fills * memory / GIB:.1f} GiB of a GPU; {LESS[_kind(need)]}"
    )
