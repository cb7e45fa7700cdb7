"""Random-weight models of many families, small enough for a backward pass per example."""

from copy import deepcopy

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
)

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SHAPE, "num_key_value_heads": 1, "head_dim": 32}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**GROUPED),
    "qwen2": Qwen2Config(**{**SHAPE, "num_key_value_heads": 1}),
    "qwen3": Qwen3Config(**GROUPED),
    "gemma3": Gemma3TextConfig(**GROUPED, sliding_window=64),
    "phi3": Phi3Config(**{**SHAPE, "num_key_value_heads": 1}),
    "gpt_neox": GPTNeoXConfig(**SHAPE),
    "qwen2_moe": Qwen2MoeConfig(
        **{**SHAPE, "num_key_value_heads": 1},
        moe_intermediate_size=32,
        shared_expert_intermediate_size=64,
        num_experts=4,
        num_experts_per_tok=2,
    ),
    "mixtral": MixtralConfig(**GROUPED, num_local_experts=2, num_experts_per_tok=1),
}


def tiny(
    family: str = "llama", seed: int = 0, attention: str = "eager", dtype: torch.dtype = torch.float32
) -> torch.nn.Module:
    """A new model of a family, determined by the seed."""
    torch.manual_seed(seed)
    config = deepcopy(CONFIGS[family])  # the model writes its dtype into it
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype).eval()
