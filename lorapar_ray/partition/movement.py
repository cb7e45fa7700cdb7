"""Which elements training moved, and whether a mask holds them.

Fine-tuning moves a small part of a model's weights most (Mukherjee et al., "Reinforcement Learning Finetunes Small
Subnetworks in Large Language Models", arXiv 2505.11711). A mask that is drawn before training should hold those
elements better than a random one of its size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lorapar_ray.partition.blocks import same_layout
from lorapar_ray.partition.control import jaccard
from lorapar_ray.partition.select import keep_count, random_mask


@dataclass(frozen=True)
class Movement:
    """A mask against the elements that moved most, as many as the mask keeps."""

    kept: float
    """Share of all elements that the mask keeps."""
    moved: float
    """Share of all elements that changed at all."""
    mask: float
    """Jaccard index of the elements that moved most with the mask."""
    random: float
    """The same with a random mask of that size."""


def most_moved(before: Mapping[str, Tensor], after: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Bool masks of the `count` elements with the largest |after − before|; ties by position.

    Raises:
        ValueError: `count` is negative or more than there are elements.
        UserError: the two are not of one layout, or an element is not finite.
    """
    same_layout(before, after, "adapters before and after training")
    return keep_count({key: (after[key].float() - before[key].float()).abs() for key in before}, count)


def movement(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], mask: Mapping[str, Tensor], seed: int = 0
) -> Movement:
    """Compare a bool mask of an adapter's elements with what training without a mask moved most.

    Args:
        seed: of the random mask.

    Raises:
        UserError: as `most_moved`, or the mask is of another layout.
    """
    same_layout(before, mask, "adapter and mask")
    count, elements = sum(int(each.sum()) for each in mask.values()), sum(each.numel() for each in mask.values())
    moved = most_moved(before, after, count)
    changed = sum(int((before[key] != after[key]).sum()) for key in before)
    return Movement(
        kept=count / elements,
        moved=changed / elements,
        mask=jaccard(moved, mask),
        random=jaccard(moved, random_mask(mask, count, seed)),
    )
