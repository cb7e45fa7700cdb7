"""Several LoRA adapters of one shape on one frozen base, in one forward and backward pass.

The rows of a batch are sorted by adapter, equally many for each. The base's products run once over all tokens: one read
of each weight and one launch, over a larger matrix. The adapters' matrices are stacked [K, …], so their products are
batched over K contiguous slices, with as many launches as for one adapter. A row is never multiplied by another
adapter's matrices, and a row with NaN does not affect the rows of other adapters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorapar_ray.adapters.keys import ADAPTER
from lorapar_ray.adapters.store import read_adapter_state
from lorapar_ray.boundary import read_object
from lorapar_ray.mergeable import PREFIX


@dataclass
class Batch:
    """State of the current pass that every layer reads."""

    arms: int = 1
    """Number of adapters with rows in the batch (the first ones)."""
    tokens: int = 0
    base: bool = False
    """Compute the base without adapters."""


class ManyLora(nn.Module):
    """A frozen linear layer with K LoRA adapters."""

    scaling_K11: Tensor

    def __init__(
        self, base_layer: nn.Module, a_KRI: Tensor, b_KOR: Tensor, scaling_K: Tensor, dropout: float, batch: Batch
    ) -> None:
        """Take the layer, and each adapter's A, B and scaling."""
        super().__init__()
        self.base_layer, self.batch = base_layer, batch
        self.lora_A, self.lora_B = nn.Parameter(a_KRI), nn.Parameter(b_KOR)
        self.register_buffer("scaling_K11", scaling_K[:, None, None], persistent=False)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[…, I] to [..., O]; tokens are sorted by arm, equally many for each.

        Raises:
            ValueError: the layer gets only some of the tokens, so their arms are unknown (a mixture of experts).
        """
        if self.batch.base:
            return self.base_layer(x)
        arms = self.batch.arms
        if x.shape[:-1].numel() != self.batch.tokens:
            raise ValueError("a layer with an adapter sees only some of the tokens; such a model's arms train alone")
        result = self.base_layer(x)
        stacks: list[Tensor] = [self.lora_A, self.lora_B, self.scaling_K11]
        if arms < len(self.lora_A):  # the backward pass of a slice is one more launch
            stacks = [each[:arms] for each in stacks]
        a, b, scaling = stacks
        own = self.dropout(x.to(a.dtype)).reshape(arms, -1, x.shape[-1])
        change = torch.bmm(torch.bmm(own, a.mT) * scaling, b.mT)
        return (result + change.view(result.shape)).to(result.dtype)


class ManyAdapters(nn.Module):
    """A causal language model with K adapters; takes `arms` in addition to the model's own inputs."""

    def __init__(
        self,
        base: Any,
        states: Sequence[Mapping[str, Tensor]],
        scalings: Sequence[float],
        *,
        dropout: float,
        device: torch.device,
    ) -> None:
        """Put the adapters on `base`, whose layers are replaced and whose weights are frozen.

        Args:
            states: of each adapter, by PEFT's keys; all of the same keys and shapes.
            scalings: of each, alpha / rank.
        """
        super().__init__()
        self.base, self.arms = base, len(states)
        self._batch = Batch()
        self._layers: dict[str, ManyLora] = {}
        base.requires_grad_(False)
        scaling_K = torch.tensor(list(scalings), dtype=torch.float32, device=device)
        for key in sorted(states[0]):
            if ".lora_A." not in key:
                continue
            name = key.removeprefix(PREFIX).partition(".lora_A.")[0]
            a, b = (
                torch.stack([state[each].float() for state in states]).to(device)
                for each in (key, key.replace(".lora_A.", ".lora_B."))
            )
            layer = ManyLora(base.get_submodule(name), a, b, scaling_K, dropout, self._batch)
            base.set_submodule(name, layer)
            self._layers[f"{PREFIX}{name}"] = layer
        self._of_arm = [self._views(number) for number in range(self.arms)]

    def forward(self, arms: int = 1, **inputs: Any) -> Any:
        """The model's outputs for rows of the first `arms` adapters, equally many for each."""
        self._batch.arms, self._batch.tokens = arms, inputs["input_ids"].numel()
        return self.base(**inputs)

    def stacks(self) -> list[nn.Parameter]:
        """The stacked parameters of all adapters, for which gradients are computed."""
        return [stack for layer in self._layers.values() for stack in (layer.lora_A, layer.lora_B)]

    def parameters_of(self, arm: int) -> dict[str, nn.Parameter]:
        """One adapter's parameters by PEFT's saved keys, sorted: views of the stacks."""
        return self._of_arm[arm]

    def named_parameters_of(self, arm: int) -> dict[str, nn.Parameter]:
        """The same by the names that they have in a PeftModel of this adapter alone."""
        return {key.replace(".weight", f".{ADAPTER}.weight"): value for key, value in self._of_arm[arm].items()}

    def state_of(self, arm: int) -> dict[str, Tensor]:
        """Copies of one adapter's parameters on the CPU, by PEFT's saved keys."""
        return {key: value.detach().cpu().clone() for key, value in self._of_arm[arm].items()}

    def share_gradients(self) -> None:
        """Make each adapter's gradients views of the stacks' gradients, which must exist and stay."""
        for name, layer in self._layers.items():
            for matrix, stack in (("A", layer.lora_A), ("B", layer.lora_B)):
                assert stack.grad is not None
                for arm, gradient in enumerate(stack.grad):
                    self._of_arm[arm][f"{name}.lora_{matrix}.weight"].grad = gradient

    @property
    def config(self) -> Any:
        """The base's."""
        return self.base.config

    @property
    def dtype(self) -> torch.dtype:
        """The base's."""
        found: torch.dtype = self.base.dtype
        return found

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """As a PeftModel does: within this context passes compute the base."""
        self._batch.base = True
        try:
            yield
        finally:
            self._batch.base = False

    def get_base_model(self) -> Any:
        """As a PeftModel does."""
        return self.base

    def get_output_embeddings(self) -> Any:
        """As a PeftModel does."""
        return self.base.get_output_embeddings()

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """As a PeftModel does."""
        self.base.gradient_checkpointing_enable(**options)

    def _views(self, arm: int) -> dict[str, nn.Parameter]:
        found = {}
        for name, layer in self._layers.items():
            found[f"{name}.lora_A.weight"] = nn.Parameter(layer.lora_A.data[arm])
            found[f"{name}.lora_B.weight"] = nn.Parameter(layer.lora_B.data[arm])
        return dict(sorted(found.items()))


def load_many(base: Any, folders: Sequence[Path], *, dropout: float, device: torch.device) -> ManyAdapters:
    """Put adapters of equal shapes from these folders on `base`.

    Raises:
        UserError: an adapter is missing or damaged.
    """
    states = [read_adapter_state(folder) for folder in folders]
    scalings = [_scaling_of(read_object(folder / "adapter_config.json")) for folder in folders]
    return ManyAdapters(base, states, scalings, dropout=dropout, device=device)


def _scaling_of(config: Mapping[str, Any]) -> float:
    """LoRA's scaling by an `adapter_config.json`."""
    rank = float(config["r"])
    return float(config["lora_alpha"]) / (sqrt(rank) if config.get("use_rslora") else rank)
