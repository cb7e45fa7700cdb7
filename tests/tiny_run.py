"""A student of a few thousand weights with a real tokenizer, and the config that runs the whole pipeline on it."""

import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lorapar_ray.cli import main
from lorapar_ray.files import finished_files
from lorapar_ray.models import resolve_model

ROOT = Path(__file__).parents[1]
SOURCES = {
    name: [{"reader": "reasoning_gym", "task": "chain_sum", "rows": rows, "seed": seed, "options": {"max_terms": 3}}]
    for name, rows, seed in (("train", 48, 1), ("test", 12, 2))
}
GRPO_STEPS = 8
ENGINE = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 16, "enforce_eager": True}


def save_tiny_student(folder: Path) -> Path:
    """A random two-layer Llama in bfloat16 that vLLM can run on a CPU (head size 32), with SmolLM2's tokenizer.

    Its frozen head can tell which tokens begin a word, like a trained head. So it can learn to write words in a few
    steps.
    """
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("package:smollm2-135m-instruct"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.1,
    )
    model = LlamaForCausalLM(config)
    begins = torch.tensor([token.startswith("Ġ") for token in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))])
    direction = torch.nn.functional.normalize(torch.randn(config.hidden_size), dim=0)
    model.lm_head.weight.data += torch.where(begins[:, None], direction, -direction)
    model.bfloat16().save_pretrained(folder)  # as models are published
    tokenizer.save_pretrained(folder)
    return folder


def tiny_config(student: Path) -> dict[str, Any]:
    """Every stage, a few steps each."""
    teacher = {
        "model": str(student),
        "engine": {**ENGINE, "max_model_len": 512},
        "resources": {"cpus": 0.3, "threads": 1},
    }
    return {
        "name": "tiny",
        "seed": 3,
        "model": {"path": str(student), "dtype": "float32"},
        "data": SOURCES,
        "label": {
            "calibration": "batch",
            "rows_per_block": 16,
            "quorum": 2,
            "teachers": [{**teacher, "name": "a"}, {**teacher, "name": "b", "example_order": "system2_first"}],
            "resources": {"cpus": 0.25},
        },
        "adapter": {"rank": 4, "alpha": 8, "warmup_steps": 2},
        "score": {"examples_per_system": 12, "batch_size": 4, "unit_size": 4, "max_length": 128},
        "partition": {"theta": 0.9, "alpha": 0.5, "beta": 0.5},
        "sft": {
            "epochs": 4,
            "batch_size": 4,
            "micro_batch_size": 2,
            "learning_rate": 1e-2,
            "weight_decay": 0.1,
            "max_length": 128,
            "checkpoint_every": 2,
        },
        "grpo": {
            "steps": GRPO_STEPS,
            "prompts_per_step": 2,
            "group_size": 4,
            "max_prompt_length": 128,
            "max_completion_length": 8,
            "learning_rate": 2e-2,
            "schedule": "constant",
            "weight_decay": 0.1,
            "warmup_ratio": 0.0,
            "checkpoint_every": 1,
            "canary_tolerance": 0.01,
            "rewards": [{"name": "tests.e2e.rewards:words"}],
            "rollout_engine": ENGINE,
        },
        "evaluate": {"max_new_tokens": 8, "engine": ENGINE},
    }


def write_config(path: Path, config: dict[str, Any]) -> Path:
    """The config as a YAML file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.dump(config, Dumper=yaml.CSafeDumper, sort_keys=False))  # ten times as fast as `safe_dump`
    return path


def lorapar_here(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The CLI's entry point in this process; it uses this process's Ray, if any."""
    output, errors, usual, status = StringIO(), StringIO(), sys.argv, 0
    sys.argv = ["lorapar", *map(str, arguments)]
    try:
        with redirect_stdout(output), redirect_stderr(errors):
            main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.argv = usual
    return subprocess.CompletedProcess(list(map(str, arguments)), status, output.getvalue(), errors.getvalue())


def lorapar(*arguments: str | Path, timeout: float = 1000, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the CLI like a user, in a separate process; output is captured."""
    return subprocess.run(
        command(*arguments), cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=timeout
    )


def command(*arguments: str | Path) -> list[str]:
    """The CLI's command line."""
    return [sys.executable, "-m", "lorapar_ray.cli", *map(str, arguments)]


def sums_in(run: Path) -> list[Path]:
    """The sums of gradients that scoring has saved."""
    folders = (run / "work" / "score").glob("sums-*")
    return sorted(file for folder in folders for file in finished_files(folder) if file.suffix == ".safetensors")


def stored_votes(run: Path) -> dict[tuple[bytes, bytes], float]:
    """Every answer in the run's vote store with its latency, by (question, teacher); a repeated request gets another
    latency."""
    if not (run / "work" / "votes.sqlite").is_file():
        return {}
    with closing(sqlite3.connect(run / "work" / "votes.sqlite", timeout=30)) as store:
        try:
            return {(q, t): s for q, t, s in store.execute("SELECT question, teacher, latency_s FROM answers")}
        except sqlite3.OperationalError:  # the store is being created
            return {}


def metrics(run: Path, name: str) -> list[dict[str, Any]]:
    """Lines of a run's metrics file."""
    path = run / "metrics" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
