"""Estimates the GPU memory of every process of a run before anything starts, for `lorapar run --dry-run`."""

from lorapar_ray.lazy import exports

__all__ = ["Device", "Need", "StudentSize", "device_of", "memory_lines", "needs_of", "student_size"]

__getattr__ = exports(
    __name__,
    {
        "device": ("Device", "device_of"),
        "needs": ("Need", "needs_of"),
        "plan": ("memory_lines",),
        "student": ("StudentSize", "student_size"),
    },
)
