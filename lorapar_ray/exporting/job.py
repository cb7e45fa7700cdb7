"""Exports an adapter, or the model merged with it, to a directory."""

from __future__ import annotations

import shutil
from pathlib import Path

from lorapar_ray.boundary import read_object
from lorapar_ray.config import Config
from lorapar_ray.datasets.chat import load_encoder
from lorapar_ray.errors import UserError
from lorapar_ray.exporting.card import model_card
from lorapar_ray.files import atomic_path, write_json
from lorapar_ray.models import loading, resolve_model
from lorapar_ray.pipeline import is_done
from lorapar_ray.precision import torch_dtype
from lorapar_ray.progress import console
from lorapar_ray.reporting.data import read_run
from lorapar_ray.result_stages import said
from lorapar_ray.runs import RunDirectory


def export(config: Config, run: RunDirectory, out: Path, stage: str | None = None, *, merged: bool = False) -> str:
    """Write a stage's result to `out`, which must not exist; returns the stage.

    The adapter is a plain LoRA on the original base, also of a run that trained against a residual base (PiSSA, OLoRA).
    Results that are out of date are not in the card; which ones is printed.

    Args:
        stage: `sft` or `grpo`; None: the last of the run's order.
        merged: the whole model, base + s·BA, by stock peft, with its tokenizer. In the config's dtype; with `auto` in
            what this machine's CPU computes in, which the card names.

    Raises:
        UserError: the stage is not in the run or has not finished, `out` exists, or the base cannot be loaded.
    """
    stage = stage or config.order[-1]
    if stage not in config.order:
        raise UserError(f"--stage {stage}: not in this run's order [{', '.join(config.order)}]")
    if not is_done(config, run, stage):
        raise UserError(f"stage '{stage}' has not finished in '{run.place}'; run `lorapar run` first")
    if out.exists():
        raise UserError(f"--out '{out}': already exists; choose another")
    folder: Path = {"sft": run.sft, "grpo": run.grpo}[stage] / "adapter"
    if merged and config.adapter.method != "lora":
        raise UserError(f"--merged: adapter.method {config.adapter.method} has nothing to merge; export the adapter")
    with atomic_path(out) as draft:
        dtype = None
        if merged:
            dtype = _merge(config, folder, draft)
        else:
            shutil.copytree(folder, draft, ignore=shutil.ignore_patterns("README.md"))
            settings = read_object(folder / "adapter_config.json")
            write_json(draft / "adapter_config.json", {**settings, "base_model_name_or_path": config.model.path})
        data = read_run(config, run)
        (draft / "README.md").write_text(model_card(config, data, stage, merged=dtype), encoding="utf-8")
    if data.state.outdated:
        console.print(f"  the card leaves out results that are out of date: {said(data.state.outdated)}")
    return stage


def _merge(config: Config, adapter: Path, out: Path) -> str:
    """Write the merged model; returns the name of its dtype."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = resolve_model(config.model.path)
    ends = load_encoder(base, None, config.model.trust_remote_code).end_ids
    trusted = {"trust_remote_code": config.model.trust_remote_code}
    with loading(base):
        dtype = torch_dtype(config.model.dtype, torch.device("cpu"))
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, use_safetensors=True, **trusted)
        tokenizer = AutoTokenizer.from_pretrained(base, **trusted)
    whole = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    whole.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]  # any engine stops where training ended
    whole.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return str(dtype).removeprefix("torch.")
