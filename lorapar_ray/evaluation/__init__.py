"""Accuracy on held-out questions, always with its interval."""

from lorapar_ray.evaluation.accuracy import accuracy, wilson_interval

__all__ = ["accuracy", "wilson_interval"]
