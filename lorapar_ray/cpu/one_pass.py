"""AdamW on the active elements of a CPU's float32 parameters, in one pass over memory.

torch would gather, step and scatter in three passes, the first and the last on one core each. Here numba (a dependency
of vLLM) compiles one loop that moves a block of active elements into the nearest cache, steps it and writes it back, on
all of torch's threads. numba caches compiled code as pickles, so the cache is off and every process compiles: 3 s.

The arithmetic is that of torch's fused kernel, operation by operation and with its fused multiply-adds, which the
compiler chooses and which may differ in another build of torch. So the first use compares the two; if a bit differs, or
numba is missing, `one_pass` returns None and `MaskedAdamW` uses torch's kernel.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

BLOCK = 64
"""Elements stepped at once by one core: a few vectors of them, so that fetching the next ones overlaps arithmetic."""
PARTS = 4
"""Ranges per thread: more than one, so that a delayed core delays the others less."""

Step = Callable[..., None]


def fits(values: Sequence[Tensor], gradients: Sequence[Tensor], indices: Sequence[Tensor | None]) -> bool:
    """Whether `one_pass` supports these tensors."""
    return all(
        tensor.device.type == "cpu" and tensor.dtype == torch.float32 and tensor.is_contiguous()
        for tensor in (*values, *gradients)
    ) and all(index is None or index.dtype == torch.int32 for index in indices)


@cache
def one_pass() -> Step | None:
    """The compiled step, or None if it cannot be compiled or its bits differ from those of torch's fused kernel.

    Called as `step(values, gradients, indices, exp_avgs, exp_avg_sqs, number, group)`: parameters and gradients in
    full (see `fits`), positions of their active elements (None: all), the moments of the active elements, the number of
    this step (from 1) and a parameter group's settings. Works in place.
    """
    try:
        compiled = _compile()
    except ImportError:
        return None

    def step(
        values: Sequence[Tensor],
        gradients: Sequence[Tensor],
        indices: Sequence[Tensor | None],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        number: int,
        group: dict[str, Any],
    ) -> None:
        compiled(
            np.cumsum([0, *(moment.numel() for moment in exp_avgs)]),
            *(_addresses(tensors) for tensors in (values, gradients, indices, exp_avgs, exp_avg_sqs)),
            *_factors(number, group),
        )

    with _openmp_as_it_was():
        return step if _same_bits(step) else None


@contextmanager
def _openmp_as_it_was() -> Iterator[None]:
    """Keep torch's threads as they are while numba starts its own.

    Both use OpenMP. numba resets the number of threads and enables nested teams; then the matrix products inside
    torch's parallel attention start their own teams, which is eight times slower.
    """
    threads, openmp = torch.get_num_threads(), ctypes.CDLL(None)
    nested = openmp.omp_get_nested() if hasattr(openmp, "omp_get_nested") else None
    levels = openmp.omp_get_max_active_levels() if nested is not None else None
    try:
        yield
    finally:
        if nested is not None:
            openmp.omp_set_nested(nested)
            openmp.omp_set_max_active_levels(levels)
        torch.set_num_threads(threads)


def _addresses(tensors: Sequence[Tensor | None]) -> np.ndarray[Any, Any]:
    return np.array([0 if tensor is None else tensor.data_ptr() for tensor in tensors], dtype=np.uint64)


def _factors(number: int, group: dict[str, Any]) -> tuple[Any, ...]:
    """Factors that are the same for every element, in double precision like torch."""
    (beta1, beta2), rate = group["betas"], float(group["lr"])
    toward = np.float32(1 - beta1)
    near = bool(toward < 0.5)  # torch interpolates from the nearer end
    return (
        near,
        toward if near else toward - np.float32(1),
        np.float32(beta2),
        np.float32(1 - beta2),
        np.float32(math.sqrt(1 - beta2**number)),
        np.float32(group["eps"]),
        np.float32(1 - rate * group["weight_decay"]),
        np.float32(-rate / (1 - beta1**number)),
    )


def _same_bits(step: Step) -> bool:
    """Three steps of random elements, compared with torch."""
    from lorapar_ray.optim.kernel import torch_adamw  # which imports this module for MaskedAdamW

    generator = torch.Generator().manual_seed(0)
    group = {"betas": (0.9, 0.999), "lr": 1e-2, "eps": 1e-8, "weight_decay": 0.1}
    start = torch.randn(4096, generator=generator)
    ours, theirs = ([start.clone(), torch.zeros(4096), torch.zeros(4096)] for _ in range(2))
    for number in (1, 2, 3):
        gradient = torch.randn(4096, generator=generator)
        step([ours[0]], [gradient], [None], [ours[1]], [ours[2]], number, group)
        torch_adamw([theirs[0]], [gradient], [theirs[1]], [theirs[2]], number, group, fused=True)
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def _intrinsics() -> tuple[Any, Any, Any]:
    """What numba lacks, as functions for compiled code: an address as a pointer to float32, an address as a pointer to
    int32, and a · b + c in float32, rounded once."""
    from numba import types
    from numba.extending import intrinsic

    def pointer_to(element: Any) -> Any:
        @intrinsic
        def pointer(_: Any, address: Any) -> Any:
            signature = types.CPointer(element)(types.uint64)

            def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
                return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

            return signature, build

        return pointer

    @intrinsic
    def fma(_: Any, a: Any, b: Any, c: Any) -> Any:
        signature = types.float32(types.float32, types.float32, types.float32)
        return signature, lambda context, builder, signature, arguments: builder.fma(*arguments)

    return pointer_to(types.float32), pointer_to(types.int32), fma


def _compile() -> Step:
    """The step as compiled code; it takes `ends` (where each parameter's active elements end, from 0), `_addresses` of
    the tensors and `_factors`.

    Raises:
        ImportError: numba is missing.
    """
    import numba

    floats, positions, fma = _intrinsics()

    @numba.njit(error_model="numpy")  # type: ignore[untyped-decorator]
    def step_range(
        start: Any, stop: Any, ends: Any, values: Any, gradients: Any, indices: Any, exp_avgs: Any, exp_avg_sqs: Any,
        near: Any, toward: Any, beta2: Any, share2: Any, correction2: Any, eps: Any, keep: Any, rate: Any,
    ) -> None:  # fmt: skip
        x, g = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
        member = np.searchsorted(ends, start, side="right") - 1
        at = start
        while at < stop:
            while ends[member + 1] <= at:
                member += 1
            value, gradient = floats(values[member]), floats(gradients[member])
            exp_avg, exp_avg_sq = floats(exp_avgs[member]), floats(exp_avg_sqs[member])
            everything, position = indices[member] == 0, positions(indices[member])
            first, end = ends[member], min(stop, ends[member + 1])
            while at < end:
                n, own = min(BLOCK, end - at), at - first
                if everything:
                    for i in range(n):
                        g[i] = gradient[own + i]
                        x[i] = value[own + i]
                else:
                    for i in range(n):
                        k = np.int64(position[own + i])
                        g[i] = gradient[k]
                        x[i] = value[k]
                for i in range(n):
                    m, v = exp_avg[own + i], exp_avg_sq[own + i]
                    m = fma(toward, g[i] - m, m if near else g[i])
                    v = fma(share2 * g[i], g[i], v * beta2)
                    x[i] = x[i] * keep + rate * m / (np.sqrt(v) / correction2 + eps)
                    exp_avg[own + i], exp_avg_sq[own + i] = m, v
                if everything:
                    for i in range(n):
                        value[own + i] = x[i]
                else:
                    for i in range(n):
                        value[np.int64(position[own + i])] = x[i]
                at += n

    @numba.njit(parallel=True)  # type: ignore[untyped-decorator]
    def step_parts(
        parts: Any, ends: Any, values: Any, gradients: Any, indices: Any, exp_avgs: Any, exp_avg_sqs: Any,
        near: Any, toward: Any, beta2: Any, share2: Any, correction2: Any, eps: Any, keep: Any, rate: Any,
    ) -> None:  # fmt: skip
        for part in numba.prange(parts):
            step_range(
                ends[-1] * part // parts, ends[-1] * (part + 1) // parts, ends, values, gradients, indices,
                exp_avgs, exp_avg_sqs, near, toward, beta2, share2, correction2, eps, keep, rate,
            )  # fmt: skip

    def run(*arguments: Any) -> None:
        threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
        numba.set_num_threads(threads)
        step_parts(PARTS * threads, *arguments)

    return run
