"""PEFT methods other than LoRA, for comparison with stage 1: prompt tuning, P-tuning, prefix tuning and IA3.

They have no A and B to score, so they train whole. Their settings follow their papers: prompts begin as embeddings of
tokens (Lester et al., arXiv 2104.08691, section 3.2), P-tuning learns them through an MLP (arXiv 2103.10385), prefixes
are learnt directly (arXiv 2101.00190, without its reparameterisation), and IA3 scales keys, values and the inner
activations of the feed-forward layers (arXiv 2205.05638).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorapar_ray.adapters.store import require_finite
from lorapar_ray.adapters.targets import module_type, resolve_targets
from lorapar_ray.files import atomic_path

IA3_TYPES = ("k", "v", "qkv", "down")


def attach_method(model: nn.Module, method: str, *, virtual_tokens: int, seed: int) -> Any:
    """A PeftModel of `model` for a method other than LoRA, its parameters in float32, the same for the same seed.

    Raises:
        UserError: IA3 on a model without key, value and down projections.
    """
    from peft import get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        peft_model = get_peft_model(model, _settings(model, method, virtual_tokens))
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return peft_model


def save_method(peft_model: Any, folder: Path) -> None:
    """Save like PEFT; the directory appears atomically.

    Raises:
        UserError: a trained number is not finite; nothing is written.
    """
    require_finite(folder, {key: value for key, value in peft_model.named_parameters() if value.requires_grad})
    with atomic_path(folder) as draft:
        peft_model.save_pretrained(draft)
        (draft / "README.md").unlink(missing_ok=True)


def _settings(model: nn.Module, method: str, virtual_tokens: int) -> Any:
    from peft import IA3Config, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig

    common: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    if method == "prompt_tuning":
        return PromptTuningConfig(**common, num_virtual_tokens=virtual_tokens, prompt_tuning_init="SAMPLE_VOCAB")
    if method == "p_tuning":
        width = model.config.get_text_config().hidden_size  # type: ignore[union-attr,operator]
        return PromptEncoderConfig(**common, num_virtual_tokens=virtual_tokens, encoder_hidden_size=width)
    if method == "prefix_tuning":
        return PrefixTuningConfig(**common, num_virtual_tokens=virtual_tokens)
    layers = [name for name in resolve_targets(model, "qkvgud") if module_type(name) in IA3_TYPES]
    return IA3Config(
        **common, target_modules=layers, feedforward_modules=[n for n in layers if module_type(n) == "down"]
    )
