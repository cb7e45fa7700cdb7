"""Replaces vLLM's LoRA products on a CPU; runs inside vLLM's worker.

vLLM copies an adapter's matrices for every token, which takes longer than the layer itself; and a token without an
adapter, in a step with tokens that have one, gets the adapter of the last slot. Here the matrices of a step's adapters
are multiplied side by side, and what a token has of others' adapters is set to zero between the two products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class SideBySide(NamedTuple):
    """A module's matrices of the K adapters of a step, of rank R and for S slices of the output."""

    made_from: tuple[object, ...]
    a_SKR: Tensor
    """[S·K·R, input size]."""
    b: list[Tensor]
    """By slice, [K·R, the slice's size]."""


class LoraProducts:
    """The replacement for two methods of one `PunicaWrapperCPU`; N is the number of a step's tokens."""

    def __init__(self, wrapper: Any) -> None:
        self._wrapper = wrapper
        self._update = wrapper.update_metadata
        self._slots: list[int] = []
        self._others_NK: Tensor | None = None
        """Which adapters are not a token's; None if all tokens use the same one."""
        self._kept: dict[int, SideBySide] = {}
        """By module: copied again only when an adapter changes, or when a step has other adapters."""

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        """Like vLLM's, which is called before a step whose tokens' adapters differ from the last step's."""
        self._update(*args, **kwargs)
        slot_N = self._wrapper.token_lora_indices
        used = slot_N.unique()
        used_K = used[used >= 0]
        self._slots = used_K.tolist()
        self._others_NK = slot_N.unsqueeze(1) != used_K if len(used) > 1 else None

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: Sequence[Tensor],
        lora_b_stacked: Sequence[Tensor],
        scale: float,
        output_slices: Sequence[int],
        *,
        add_inputs: bool = True,
        **_: Any,
    ) -> None:
        """Add each token's scale · BAx to its row of y, or write it there without `add_inputs`.

        Args:
            y: [N, sum of output_slices], changed in place.
            x: [N, input size].
            lora_a_stacked: by slice, [slots, 1, R, input size].
            lora_b_stacked: by slice, [slots, 1, the slice's size, R].
        """
        if not add_inputs:
            y.zero_()
        if not self._slots:
            return
        matrices = self._side_by_side(lora_a_stacked, lora_b_stacked)
        inner_NSKR = (x @ matrices.a_SKR.T).view(len(x), len(output_slices), len(self._slots), -1)
        if self._others_NK is not None:  # not multiplied by 0: another adapter's overflow must not spread
            inner_NSKR.masked_fill_(self._others_NK[:, None, :, None], 0)
        parts = y.split(list(output_slices), dim=1)
        for part, inner_NKR, b_KR in zip(parts, inner_NSKR.unbind(1), matrices.b, strict=True):
            part.addmm_(inner_NKR.flatten(1), b_KR, alpha=scale)

    def _side_by_side(self, lora_a_stacked: Sequence[Tensor], lora_b_stacked: Sequence[Tensor]) -> SideBySide:
        versions = [each._version for each in (*lora_a_stacked, *lora_b_stacked)]
        module, made_from = lora_a_stacked[0].data_ptr(), (*versions, *self._slots)
        kept = self._kept.get(module)
        if kept is None or kept.made_from != made_from:
            a_SKR = torch.cat([each[self._slots].flatten(0, 2) for each in lora_a_stacked])
            b = [each[self._slots].squeeze(1).transpose(1, 2).flatten(0, 1) for each in lora_b_stacked]
            kept = self._kept[module] = SideBySide(made_from, a_SKR, b)
        return kept


def replace_lora_products(model: Any) -> None:
    """Install on each LoRA wrapper of a vLLM model; does nothing without LoRA."""
    for wrapper in getattr(getattr(model, "lora_manager", None), "punica_wrapper_mapping", {}).values():
        products = LoraProducts(wrapper)
        wrapper.update_metadata, wrapper.add_lora_linear = products.update_metadata, products.add_lora_linear
