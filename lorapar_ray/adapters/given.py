"""The user's LoRA (`adapter.init: adapter`): accepted only if the run computes the same logits as stock PEFT.

PEFT's LoRA has about forty settings, and new versions add more; a run serves and trains base + s·BA with one rank and
one alpha. So there is an allow-list of settings, and a round trip checks the rest: in stock PEFT the user's directory
and the directory that the run saved must give the same logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lorapar_ray.adapters.keys import adapter_parameters
from lorapar_ray.adapters.store import CONFIG, WEIGHTS, load_adapter, save_adapter
from lorapar_ray.boundary import boundary, read_object, read_tensors
from lorapar_ray.errors import UserError
from lorapar_ray.files import atomic_path
from lorapar_ray.mergeable import base_name

ANY_VALUE = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_dropout",
        "peft_type",
        "peft_version",
        "r",
        "revision",
        "target_modules",
        "task_type",
        "use_rslora",
    }
)
"""Settings of `adapter_config.json` that may have any value: they do not change base + s·BA."""
PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that leave the base as it is; the others (PiSSA, OLoRA, ...) change it on loading."""
FIX = "give a plain LoRA as PEFT saves it"
PROBE_TOKENS, PROBE_SEQUENCES = 24, 2
LARGEST_GAP = 1e-3
"""Tolerance of logits, relative to the largest one; both sides compute on the same machine."""


def require_lora(folder: Path, field: str = "adapter.path") -> None:
    """Check the user's adapter directory, without loading the model.

    Args:
        field: the config field that names it.

    Raises:
        UserError: it is missing or damaged, holds no safetensors, another kind of adapter, or a LoRA with settings or
            tensors beyond base + s·BA with one rank and one alpha.
    """
    where = f"{field} '{folder}'"
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise UserError(f"{where}: needs {CONFIG} and {WEIGHTS}, as PEFT saves them")
    settings = read_object(folder / CONFIG, FIX)
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{where}: holds a {kind} adapter; only LoRA has elements to score and cut")
    for name, lowest in (("r", 1), ("lora_alpha", 0)):
        value = settings.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not lowest <= value < 2**31:
            raise UserError(
                f"{where}: its {name} is {value!r}, which is not a valid {'rank' if name == 'r' else 'alpha'}; {FIX}"
            )
    _require_plain(where, settings)
    for key, tensor in read_tensors(folder / WEIGHTS, FIX).items():
        if not key.endswith((".lora_A.weight", ".lora_B.weight")):
            raise UserError(f"{where}: holds '{key}', which is neither A nor B of a linear layer; {FIX}")
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{where}: '{key}' holds numbers that are not finite floats; {FIX}")


def _require_plain(where: str, settings: Mapping[str, Any]) -> None:
    from peft import LoraConfig

    usual = LoraConfig().to_dict()
    for name, value in settings.items():
        if name == "init_lora_weights":
            if value not in PLAIN_INITS:
                raise UserError(
                    f"{where}: init_lora_weights is {value!r}, so PEFT changes the base when it loads this adapter; "
                    "convert it to a plain LoRA (PEFT: save_pretrained(..., path_initial_model_for_weight_conversion))"
                )
        elif name not in ANY_VALUE and value and value != usual.get(name):
            raise UserError(f"{where}: has {name}, but engines serve base + s·BA with one rank and one alpha; {FIX}")


def take_over(base_model: Any, source: Path, target: Path, model: str) -> float:
    """Save the adapter of `source` as the run's own in `target`, if both give the same logits in stock PEFT.

    Args:
        base_model: the model as transformers loads it; its modules are wrapped and unwrapped.
        model: its name, for messages.

    Returns:
        the largest difference of the logits.

    Raises:
        UserError: the adapter does not fit the model, or the run would compute something else.
    """
    from peft import PeftModel

    where = f"adapter.path '{source}'"
    fits = boundary(f"{where} does not fit model.path '{model}'", "give an adapter that was trained on this base")
    with atomic_path(target) as draft, fits:
        before = _logits(base_model)
        if not bool(torch.isfinite(before).all()):
            raise UserError(f"model.path '{model}': its logits are not finite numbers; check its weights")
        user = PeftModel.from_pretrained(base_model, str(source))
        wanted = _logits(user)
        _require_same_keys(where, model, user, set(read_tensors(source / WEIGHTS, FIX)))
        base_model = user.unload()
        if not torch.equal(before, _logits(base_model)):
            raise UserError(f"{where}: PEFT changes the base when it loads this adapter; {FIX}")
        own = load_adapter(base_model, source)
        save_adapter(own, draft)
        run = PeftModel.from_pretrained(own.unload(), str(draft))
        gap = float((_logits(run) - wanted).abs().max())
        if not gap <= LARGEST_GAP * max(1.0, float(wanted.abs().max())):
            raise UserError(f"{where}: the run would compute other logits than stock PEFT (by {gap:.2g}); {FIX}")
    return gap


def _require_same_keys(where: str, model: str, user: Any, saved: set[str]) -> None:
    """PEFT only warns about missing tensors (it draws them at random) and about extra ones (it ignores them)."""
    live, base = set(adapter_parameters(user)), dict(user.get_base_model().named_parameters())
    own = {name.replace(".base_layer.", ".") for name in base}
    for what, keys in (("lacks", live - saved), ("has the extra tensor", saved - live)):
        if keys:
            raise UserError(f"{where}: {what} '{min(keys)}' ({len(keys)} in all) for model.path '{model}'; {FIX}")
    apart = {base_name(key) for key in live} - own
    if apart:  # a tied output layer has no weight of its own that an engine could change
        raise UserError(f"{where}: adapts '{min(apart)}', which model.path '{model}' shares with its embeddings; {FIX}")


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    """Logits of fixed random tokens, float32 on the CPU."""
    vocabulary = model.config.get_text_config().vocab_size
    drawn = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (PROBE_SEQUENCES, PROBE_TOKENS), generator=drawn)
    logits: torch.Tensor = model.eval()(input_ids=ids.to(next(model.parameters()).device)).logits
    return logits.float().cpu()
