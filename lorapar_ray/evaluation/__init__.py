"""Accuracy on held-out questions, always with its interval."""

from lorapar_ray.evaluation.accuracy import accuracy
from lorapar_ray.evaluation.statistics import mean_pass_at_k, paired, pass_at_k, wilson_interval

__all__ = ["accuracy", "mean_pass_at_k", "paired", "pass_at_k", "wilson_interval"]
