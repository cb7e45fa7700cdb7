"""A tiny model for benchmarks of everything except the model."""

from __future__ import annotations

from pathlib import Path

from lorapar_ray.models import resolve_model


def tiny_model(folder: Path) -> str:
    """A random Llama of two layers that vLLM runs on any device, with SmolLM2's tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(resolve_model("package:smollm2-135m-instruct"))
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=1, **shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
