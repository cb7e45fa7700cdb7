"""The adapted linear layers of a PEFT model, in groups of those that may share their input."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorapar_ray.adapters.keys import ADAPTER
from lorapar_ray.errors import UserError


@dataclass(eq=False)
class Site:
    """One adapted linear layer."""

    name: str
    layer: Any
    scaling: float

    @property
    def keys(self) -> tuple[str, str]:
        """Keys of A and of B."""
        return f"{self.name}.lora_A.weight", f"{self.name}.lora_B.weight"

    @property
    def A(self) -> Tensor:
        return self.layer.lora_A[ADAPTER].weight.detach()

    @property
    def B(self) -> Tensor:
        return self.layer.lora_B[ADAPTER].weight.detach()


@dataclass(eq=False)
class SiteGroup:
    """Layers of one module with inputs of the same width; they share the product if they get the same input."""

    sites: list[Site]
    down: dict[torch.dtype, Tensor] = field(default_factory=dict)
    """All A's, stacked [R, in], by dtype."""
    up: dict[tuple[int, torch.dtype], Tensor] = field(default_factory=dict)
    """s·B by site and dtype."""
    shared: tuple[Any, tuple[Tensor, ...]] | None = None
    """(a weak reference to the first site's input, its product with all A's), until the last site has used it."""

    def A(self, dtype: torch.dtype) -> Tensor:
        if dtype not in self.down:
            self.down[dtype] = torch.cat([site.A for site in self.sites]).to(dtype)
        return self.down[dtype]

    def sB(self, number: int, dtype: torch.dtype) -> Tensor:
        if (number, dtype) not in self.up:
            site = self.sites[number]
            self.up[number, dtype] = (site.B * site.scaling).to(dtype)
        return self.up[number, dtype]

    @property
    def ranks(self) -> list[int]:
        return [len(site.A) for site in self.sites]


def site_groups(peft_model: Any, keys: set[str]) -> list[SiteGroup]:
    """The adapted layers, those that may share their input together.

    Args:
        keys: of the adapter's parameters.

    Raises:
        UserError: one of them is not of a plain LoRA of a linear layer.
    """
    groups: dict[tuple[str, int], SiteGroup] = {}
    found: set[str] = set()
    for name, module in peft_model.named_modules():
        if ADAPTER not in (getattr(module, "lora_A", None) or {}):
            continue
        site = Site(name, module, module.scaling[ADAPTER])
        plain = not getattr(module, "lora_variant", None) and not module.merged and module.lora_B[ADAPTER].bias is None
        if isinstance(module.lora_A[ADAPTER], nn.Linear) and plain:
            found.update(site.keys)
            place = (name.rpartition(".")[0], site.A.shape[1])
            groups.setdefault(place, SiteGroup([])).sites.append(site)
    if left := sorted(keys - found):
        raise UserError(f"'{left[0]}' is not a plain LoRA of a linear layer; leave its layer out of adapter.targets")
    return list(groups.values())
