"""The optimiser that trains only a region, and its schedules."""

from lorapar_ray.optim.groups import masked_param_groups, trainable_share
from lorapar_ray.optim.masked_adamw import MaskedAdamW
from lorapar_ray.optim.schedule import learning_rate_factor

__all__ = ["MaskedAdamW", "learning_rate_factor", "masked_param_groups", "trainable_share"]
