"""`lorapar evaluate --model ...`: models on tasks, with no run directory.

<out>/evaluation.json     what is evaluated, and how; the same command resumes from here
<out>/rows, <out>/tasks   as `lorapar_ray.evaluation.tasks` writes them
<out>/answers             what the models said, by request
<out>/index.html          the comparison, and the failures to read
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorapar_ray.boundary import read_object
from lorapar_ray.capacity import capacity, needing
from lorapar_ray.config import EvaluateConfig, ModelConfig, deciding
from lorapar_ray.config_file import config_of_options
from lorapar_ray.datasets.chat import load_encoder
from lorapar_ray.errors import UserError
from lorapar_ray.evaluation.engines import Engines
from lorapar_ray.evaluation.serving import NamedModel, named_model, require_template, serving
from lorapar_ray.evaluation.task_files import unfinished
from lorapar_ray.evaluation.task_inputs import files_read
from lorapar_ray.evaluation.tasks import catalogue_of, evaluate_tasks
from lorapar_ray.files import write_json
from lorapar_ray.fingerprints import Fingerprints
from lorapar_ray.gpus import placed_engines
from lorapar_ray.memory_shortage import ended_without_memory
from lorapar_ray.models import resolve_model
from lorapar_ray.progress import progress
from lorapar_ray.session import ray_session

ABOUT = "evaluation.json"
NOT_HERE = ("models", "answer", "max_new_tokens", "stop", "tasks")
"""Settings of test rows only, and the tasks, which a later command may extend."""


MAX_MODEL_LEN = 2048
"""Unless set: five examples of MMLU fit."""


@dataclass(frozen=True)
class Evaluation:
    """What a command asks for."""

    models: Sequence[str]
    """As `named_model` reads them."""
    settings: EvaluateConfig
    options: ModelConfig
    """`system_prompt` and `trust_remote_code` of all of them."""


def evaluation_of(models: Sequence[str], fields: Mapping[str, Any], overrides: Sequence[str]) -> Evaluation:
    """What command line options ask for.

    Args:
        fields: of `evaluate` by name; None: not given.
        overrides: `evaluate.engine.max_num_seqs=32`, `model.system_prompt=...`.

    Raises:
        UserError: one of them is unknown or out of range.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    tree = {"evaluate": {"engine": {"max_model_len": MAX_MODEL_LEN}, **given}, "model": {"path": models[0]}}
    found = config_of_options({"evaluate": EvaluateConfig, "model": ModelConfig}, tree, overrides)
    return Evaluation(models, found["evaluate"], found["model"])


def evaluate_models(asked: Evaluation, out: Path, verbose: bool = False) -> list[str]:
    """Write the results of each task for each model; finished ones are kept. Returns the models' names, in order.

    Raises:
        UserError: a model or a task cannot be loaded, or `out` holds another evaluation.
    """
    if not asked.settings.tasks:
        raise UserError("--tasks: none given; write --tasks gsm8k,mmlu@5")
    found = {text: named_model(text) for text in asked.models}
    names = dict(zip(found, short_names(list(found)), strict=True))
    due = {model for model, _ in unfinished(out, list(names.values()), asked.settings.tasks)}
    waiting = [text for text in found if names[text] in due]
    catalogue = catalogue_of(asked.settings) if waiting else None  # an unknown task leaves nothing behind in `out`
    _require_same(out, asked, {names[text]: model for text, model in found.items()})
    with ray_session(verbose) if waiting else nullcontext():
        for group in by_base({text: found[text] for text in waiting}):
            adapters = {names[text]: found[text].adapter for text in group}
            assert catalogue is not None
            _evaluate_on(found[group[0]].base, adapters, catalogue, asked, out)
    return list(names.values())


def by_base(models: Mapping[str, NamedModel]) -> list[list[str]]:
    """The models grouped by base, in order; names of the same base count as equal."""
    groups: dict[str, list[str]] = {}
    for text, model in models.items():
        groups.setdefault(resolve_model(model.base), []).append(text)
    return list(groups.values())


def _evaluate_on(base: str, adapters: Mapping[str, Path | None], catalogue: Any, asked: Evaluation, out: Path) -> None:
    """The models that share a base, on one set of engines."""
    settings = placed_engines(asked.settings, int(capacity().largest("GPU")))
    encoder = load_encoder(resolve_model(base), asked.options.system_prompt, asked.options.trust_remote_code)
    if settings.chat:
        require_template(encoder.tokenizer)
    groups = {"engines": (settings.engines, settings.resources)}
    how = serving(base, adapters.values(), settings.serve)
    trusted = asked.options.trust_remote_code
    with (
        needing("evaluate", groups),
        Engines(
            base,
            settings.engine,
            settings.resources,
            settings.engines,
            most=settings.max_engines,
            trust_remote_code=trusted,
            **how,
        ) as engines,
    ):
        with progress("engines", settings.engines, lambda: (0, "starting")), ended_without_memory("evaluate"):
            engines.start()
        evaluate_tasks(settings, catalogue, engines, adapters, encoder, root=out, answers=out / "answers")


def short_names(texts: Sequence[str]) -> list[str]:
    """A name for each model that is also a folder name: the last parts of its path, with a number if two are equal."""
    names: list[str] = []
    for text in texts:
        parts = [part for whole in text.split("+") for part in whole.removeprefix("package:").split("/")[-2:]]
        name = re.sub(r"[^\w.-]+", "_", "_".join(part for part in parts if part not in ("", ".", "..")))[-80:].lstrip(
            "._"
        )
        name = name or "model"
        names.append(name if name not in names else f"{name}-{len(names) + 1}")
    return names


def _require_same(out: Path, asked: Evaluation, models: Mapping[str, NamedModel]) -> None:
    """Record the evaluation's settings, or check that they match those in the folder."""
    settings = {
        path: setting.value
        for path, setting in deciding(asked.settings, "evaluate").items()
        if path.split(".")[1] not in NOT_HERE
    }
    settings |= {"model.system_prompt": asked.options.system_prompt}
    now = {name: {"base": model.base, "adapter": _digest(model.adapter)} for name, model in models.items()}
    prints = Fingerprints(Path())  # nothing is remembered
    files = {name: prints.of_input(name) for name in files_read(asked.settings)}
    file = out / ABOUT
    known: dict[str, Any] = {}
    begun = any((out / part).is_dir() for part in ("answers", "rows", "tasks"))  # else a refused command left it
    if file.is_file() and begun:
        known = read_object(file, "choose another --out")
        for path, value in settings.items():
            if known.get("settings", {}).get(path) != value:
                raise UserError(
                    f"--out '{out}': holds an evaluation with another {path} ({known.get('settings', {}).get(path)!r}, "
                    f"now {value!r}); choose another --out"
                )
        for name, model in now.items():
            if known.get("models", {}).get(name, model) != model:
                raise UserError(f"--out '{out}': holds results of another model called '{name}'; choose another --out")
        for name, found in files.items():
            if known.get("files", {}).get(name, found) not in (None, found) and found is not None:
                raise UserError(f"--out '{out}': holds results of '{name}' before its change; choose another --out")
    elif out.is_dir() and any(each != file for each in out.iterdir()):
        raise UserError(f"--out '{out}': is not empty and holds no {ABOUT}; choose another --out")
    there = {name: found for name, found in files.items() if found is not None}
    about = {"models": known.get("models", {}) | now, "settings": settings, "files": known.get("files", {}) | there}
    write_json(file, about)


def _digest(adapter: Path | None) -> str | None:
    if adapter is None:
        return None
    return hashlib.sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest()
