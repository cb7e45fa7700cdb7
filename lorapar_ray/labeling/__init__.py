"""Labelling: teachers vote which System a question belongs to."""

from lorapar_ray.labeling.job import label

__all__ = ["label"]
