"""Turns the failed start of an engine into one line that names the field to change.

vLLM reports failures in many ways: pydantic's errors, `ValueError`s of the cache, errors of safetensors or a driver.
Most occur in a separate process, and its parent sees only that it has ended.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lorapar_ray.errors import UserError
from lorapar_ray.text import one_line, reason
from lorapar_ray.versions import uses_gpus

CAUSE = "cause"
"""Name of the file to which a forked core writes the error that ended it."""
LENGTH = 300
WAIT_S = 20.0
"""Time for a failed core to clean up and write its cause, after it has reported the failure."""
_ELSEWHERE = "See root cause above"
"""vLLM's message for a core that has failed in a separate process."""
_PYDANTIC = re.compile(r"\bValidationError: \d+ validation errors? for \w+ (?:Value error, )?")

SHARE, CACHE = "share of the GPU", "cache"
"""In place of a field's name: see `_field`."""

# pattern of the reason (the first match counts), the field of `where` that it concerns ("": all), the fix
_FIELDS: tuple[tuple[str, str, str], ...] = (
    (r"unexpected keyword argument|extra_forbidden", "extra", "remove the setting that vLLM does not know"),
    (r"besides its cache", SHARE, "raise it, lower max_num_seqs, or give the engine a GPU of its own"),
    (r"KV cache|cache blocks|No available memory for the cache", CACHE, "raise it, or lower max_model_len"),
    (
        r"out of memory|Free memory on device|Cannot allocate memory|MemoryError|can't allocate|exit status -9\b",
        "extra.gpu_memory_utilization",
        "there is too little free memory: give the engine a smaller share or a larger GPU or node, or a smaller model",
    ),
    (r"max_num_batched_tokens", "extra.max_num_batched_tokens", "raise it, or lower max_model_len"),
    (r"max_model_len|max_position_embeddings", "max_model_len", "lower it to the model's context length"),
    (r"max_num_seqs", "max_num_seqs", "lower it"),
    (r"tensor.parallel|world.size|divisible by", "tensor_parallel", "choose one that divides the model's heads"),
    (r"bfloat16|float16|\bdtype\b", "dtype", "choose one that the device and the model support"),
    (
        r"Address already in use|Permission denied|Connection refused",
        "",
        "free the address or file that it needs, then run this again",
    ),
)


@contextmanager
def refusing(model: str, where: str, notes: Path | None) -> Iterator[None]:
    """Turn any error that ends an engine's start into one line.

    Args:
        model: the model to load.
        where: the config's field that holds the engine's settings: "evaluate.engine".
        notes: folder to which a forked core writes its `CAUSE`; None: it is not forked.

    Raises:
        UserError: names the field that the reason concerns, else the model.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        why = _cause(notes) if notes is not None and _ELSEWHERE in str(error) else ""
        raise UserError(refusal(model, where, why or reason(error, LENGTH), on_gpu=uses_gpus())) from error


def refusal(model: str, where: str, why: str, *, on_gpu: bool = False) -> str:
    """The line for `why`; it names the engine's field that caused it, else the model."""
    why = _PYDANTIC.sub("", why)
    for pattern, name, fix in _FIELDS:
        if re.search(pattern, why, re.IGNORECASE):
            return f"{_field(where, name, on_gpu)}: no engine can be started for model '{model}' ({why}); {fix}"
    return f"model '{model}': {where} cannot serve it ({why}); check its files and whether vLLM knows its architecture"


def _field(where: str, name: str, on_gpu: bool) -> str:
    """A field of the engine's, or the one that gives it its share of a GPU: beside the engine's settings."""
    share = f"{where.removesuffix('engine')}{'' if where.endswith('engine') else ' '}resources.gpus"
    if name == SHARE:
        return share
    if name == CACHE:
        return f"{where}.extra.gpu_memory_utilization (or {share})" if on_gpu else f"{where}.kv_cache_gib"
    return f"{where}{'.' * bool(name)}{name}"


def leave_cause(notes: Path, error: BaseException) -> None:
    """Write the error that ended a core, for the process that started it; that process may no longer wait for it."""
    with suppress(OSError):
        part = notes / f"{CAUSE}.part"
        part.write_text(reason(error, LENGTH), encoding="utf-8")
        part.rename(notes / CAUSE)


def _cause(notes: Path) -> str:
    """The cause that the core has written; empty if it was killed."""
    file, deadline = notes / CAUSE, time.monotonic() + WAIT_S
    while not file.is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    with suppress(OSError):
        return one_line(file.read_text(encoding="utf-8"))
    return ""
