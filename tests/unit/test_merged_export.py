"""A merged model stops where its training ended answers, in whatever engine reads its files."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lorapar_ray.adapters import attach_lora, save_adapter
from lorapar_ray.config import Config
from lorapar_ray.datasets.chat import load_encoder
from lorapar_ray.exporting.job import _merge
from lorapar_ray.models import resolve_model


def test_its_generation_config_names_every_end_of_an_answer(tmp_path: Path) -> None:
    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("package:smollm2-135m-instruct"))
    tokenizer.eos_token = "<|endoftext|>"  # the chat template ends a turn with another token
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), **shape, bos_token_id=1, eos_token_id=tokenizer.eos_token_id)
    )
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    save_adapter(attach_lora(model, rank=2, alpha=4), adapter)
    tree = {"name": "x", "model": {"path": str(base), "dtype": "float32"}}
    data = {"train": [{"reader": "file", "path": "rows.jsonl"}]}
    assert _merge(Config.model_validate({**tree, "data": data}), adapter, out) == "float32"
    named = json.loads((out / "generation_config.json").read_text())["eos_token_id"]
    assert named == tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert load_encoder(str(out), None).end_ids == named
