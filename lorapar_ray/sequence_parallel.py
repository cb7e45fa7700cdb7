"""Sequence parallelism by exchanging tokens for heads (DeepSpeed-Ulysses, arXiv 2309.14509).

P ranks share a row that is too long for one device. Each holds a slice of its tokens, 1/P of them, through embedding,
linear layers, norms and the output head, which compute each token by itself. Around attention two all-to-alls change
[tokens / P, all heads] into [all tokens, heads / P] and back. So attention sees whole rows, in any layout, with fewer
heads, and every stored activation is 1/P of the row's.

torch's own context parallelism moves keys and values instead, so it can divide any number of heads. But for its fused
kernels a row is one causal sequence. Several sequences and shared prompts in a row would need block masks
(FlexAttention), and these a compilation.

The log-probabilities of all slices come together on every rank, which then computes the whole loss. Its backward pass
goes through its own slice, so a parameter's gradients, summed over the ranks, are those of the row.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from math import gcd
from typing import Any

import torch
from torch import Tensor

from lorapar_ray.errors import UserError

FIELD = "grpo.sequence_parallel"
BY_LENGTH = ("dynamic", "longrope")
"""Rotary embeddings that depend on the longest position in a pass, which differs between slices."""


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that share a row, and this one's place among them."""

    rank: int
    size: int
    ranks: Any
    """Their process group."""

    @property
    def leads(self) -> bool:
        """Whether this rank speaks for its group, where each row counts once."""
        return self.rank == 0

    def padding(self, width: int) -> int:
        """Columns that a row of `width` lacks to be cut evenly."""
        return -width % self.size

    def own(self, width: int) -> slice:
        """This rank's columns of a row whose width is a multiple of `size`."""
        count = width // self.size
        return slice(self.rank * count, (self.rank + 1) * count)

    def to_heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Own tokens of all heads, [n, heads, D] each, to all tokens of own heads, [P · n, heads / P, D].

        Key and value heads are repeated where P does not divide their number.

        Raises:
            UserError: P does not divide the number of query heads.
        """
        require_divisible(query.shape[1], self.size)
        repeats = self.size // gcd(key.shape[1], self.size)
        if repeats > 1:
            key, value = (each.repeat_interleave(repeats, 1) for each in (key, value))
        parts = [each.unflatten(1, (self.size, -1)).transpose(0, 1) for each in (query, key, value)]
        sent = torch.cat([part.flatten(2) for part in parts], -1)  # [P, n, Σ heads / P · D]
        received = self._exchange(sent).flatten(0, 1)
        pieces = received.split([part[0, 0].numel() for part in parts], -1)
        q, k, v = (piece.unflatten(-1, part.shape[2:]) for piece, part in zip(pieces, parts, strict=True))
        return q, k, v

    def to_tokens(self, output: Tensor) -> Tensor:
        """All tokens of own heads, [P · n, heads / P, D], to own tokens of all heads, [n, heads, D]."""
        return self._exchange(output.unflatten(0, (self.size, -1))).transpose(0, 1).flatten(1, 2)

    def _exchange(self, sent: Tensor) -> Tensor:
        """[P, …] by receiver to [P, …] by sender."""
        from torch.distributed import _functional_collectives as collectives

        received = collectives.all_to_all_single_autograd(sent.contiguous(), None, None, self.ranks)
        return collectives.wait_tensor(received)

    def together(self, own: Tensor, at: Tensor, count: int) -> Tensor:
        """[…, count]: every rank's values, each at its places, on every rank.

        Each rank goes on with all values, so the gradient of its own ones is complete where it stands.

        Args:
            own: this rank's values, […, n].
            at: their places, [n]; each place belongs to one rank.
        """
        together: Tensor = _Together.apply(own, at, count, self.ranks)
        return together

    def least(self, number: int, device: torch.device) -> int:
        """The smallest `number` among the ranks."""
        import torch.distributed as dist

        smallest = torch.tensor(int(number), device=device)
        dist.all_reduce(smallest, op=dist.ReduceOp.MIN, group=self.ranks)
        return int(smallest)


def sequence_group(size: int, timeout_s: float) -> SequenceGroup | None:
    """This rank's group of `size` consecutive ranks, which every rank must ask for; None: rows are not shared.

    Args:
        timeout_s: of one collective operation.
    """
    if size == 1:
        return None
    import torch.distributed as dist

    ranks, _ = dist.new_subgroups(size, timeout=timedelta(seconds=timeout_s))
    return SequenceGroup(dist.get_rank() % size, size, ranks)


def require_shareable(config: Any, size: int) -> None:
    """Check that `size` ranks can share the rows of a model with this transformers config.

    Raises:
        UserError: its attention heads cannot be divided, or its positions depend on the whole row.
    """
    if size == 1:
        return
    text = config.get_text_config()
    require_divisible(getattr(text, "num_attention_heads", 0) or 0, size)
    rotary = getattr(text, "rope_parameters", None) or {}
    for each in (rotary, *rotary.values()):  # of all layers, or by kind of layer
        if isinstance(each, dict) and each.get("rope_type") in BY_LENGTH:
            raise UserError(
                f"{FIELD}: the model's rotary embeddings ({each['rope_type']}) depend on the longest position in a "
                "pass, so learners cannot share its sequences; set 1"
            )


def require_divisible(heads: int, size: int) -> None:
    """Check that `size` ranks can divide the query heads.

    Raises:
        UserError: they cannot.
    """
    if not heads or heads % size:
        possible = [each for each in range(1, heads + 1) if heads % each == 0] or [1]
        raise UserError(
            f"{FIELD}: {size} learners cannot divide the model's {heads} attention heads; set one of "
            + ", ".join(map(str, possible))
        )


class _Together(torch.autograd.Function):
    """Forward: sum over the ranks, each with zeros where others have values. Backward: this rank's part."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, at: Tensor, count: int, ranks: Any) -> Tensor:
        import torch.distributed as dist

        ctx.save_for_backward(at)
        whole = own.new_zeros(*own.shape[:-1], count).index_copy_(-1, at, own)
        dist.all_reduce(whole, group=ranks)
        return whole

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (at,) = ctx.saved_tensors
        return gradients[0].index_select(-1, at), None, None, None
