"""Run directories of the first manifest format, which recorded one digest of a stage's settings, sources and files.

The digest is recomputed as before, from the run's `config.yaml` with the present values of the settings that change
results. If it equals the recorded one, the stage was made with these settings: its entry is converted to the present
form, and the stage stays done.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lorapar_ray.config import Config, Section
from lorapar_ray.config.marks import mark_of
from lorapar_ray.config_file import NOT_YAML, parse_yaml
from lorapar_ray.files import digest, write_json
from lorapar_ray.manifest import FORMAT
from lorapar_ray.runs import RunDirectory
from lorapar_ray.stages import Stage
from lorapar_ray.standing import inputs_of, written

SECTIONS = {
    "label": ("data", "label"),
    "score": ("model", "adapter", "score"),
    "partition": ("partition",),
    "sft": ("model", "adapter", "sft"),
    "grpo": ("model", "grpo"),
    "evaluate": ("model", "data", "evaluate"),
    "report": (),
}
WARMUP = (
    *("batch_size", "micro_batch_size", "lora_plus_ratio", "weight_decay", "betas", "max_grad_norm", "max_length"),
    *("packing", "length_bucketing"),
)


def entries(config: Config, run: RunDirectory, pipeline: Mapping[str, Stage]) -> dict[str, Any]:
    """The manifest's entries by stage, converted from the first format if necessary."""
    manifest = run.manifest()
    found: dict[str, Any] = manifest.get("stages", {})
    if manifest.get("format", 1) != 1:
        return found
    return _migrated(config, run, found, pipeline)


def adopt(config: Config, run: RunDirectory, pipeline: Mapping[str, Stage]) -> None:
    """Write the manifest in the present format."""
    manifest = run.manifest()
    if manifest and manifest.get("format", 1) == 1:
        stages = entries(config, run, pipeline)
        write_json(run.manifest_path, {"format": FORMAT, **manifest, "stages": stages})


def _migrated(
    config: Config, run: RunDirectory, recorded: Mapping[str, Any], pipeline: Mapping[str, Stage]
) -> dict[str, Any]:
    prints = run.fingerprints
    candidates = list(_candidates(config, _tree(run)))
    found: dict[str, Any] = {}
    for name, entry in recorded.items():
        new = {**entry, "inputs": {}}
        stage = pipeline.get(name)
        for made_with, tree in candidates if stage is not None else ():
            if stage is not None and _digest(made_with, tree, name, recorded, pipeline) == entry.get("inputs"):
                new["inputs"] = inputs_of(stage, made_with, recorded, prints)
                new |= {"written": written(stage, run, prints)} if entry.get("status") == "done" else {}
                break
        found[name] = new
    return found


def _tree(run: RunDirectory) -> dict[str, Any]:
    """The settings that the run used last, as written then."""
    try:
        tree = parse_yaml((run.root / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, *NOT_YAML):
        return {}
    return tree if isinstance(tree, dict) else {}


def _candidates(config: Config, old: dict[str, Any]) -> Iterator[tuple[Config, dict[str, Any]]]:
    """Configs with which a stage may have been made (the present and the last one), each with the digested tree."""
    yield config, _overlaid(config, config.model_dump(mode="json"), old, frozenset())
    try:
        yield Config.model_validate(old), old
    except ValidationError:
        return


def _overlaid(section: Section, plain: Any, old: Any, but_not: frozenset[str]) -> Any:
    """`plain` for fields that change a result, else `old`; only fields that `old` has."""
    if not isinstance(old, dict):
        return plain
    result = dict(old)
    for field in type(section).model_fields:
        mark = mark_of(type(section), field)
        if field not in old or not mark.decides or field in but_not:
            continue
        value, new, before = getattr(section, field), plain[field], old[field]
        if isinstance(value, Section):
            result[field] = _overlaid(value, new, before, mark.but_not)
        elif isinstance(value, list) and isinstance(before, list) and all(isinstance(each, Section) for each in value):
            result[field] = [
                _overlaid(each, new[index], before[index] if index < len(before) else None, mark.but_not)
                for index, each in enumerate(value)
            ]
        elif isinstance(new, dict) and isinstance(before, dict) and mark.but_not:
            kept = {key: each for key, each in new.items() if mark.counts(key, each)}
            result[field] = kept | {key: each for key, each in before.items() if not mark.counts(key, each)}
        else:
            result[field] = new
    return result


def _digest(
    config: Config, tree: dict[str, Any], name: str, recorded: Mapping[str, Any], pipeline: Mapping[str, Stage]
) -> str | None:
    """A stage's inputs as the first format digested them."""
    try:
        settings = _settings(config, tree, name)
    except (KeyError, TypeError):
        return None
    sources = {need: recorded.get(need, {}).get("outputs") for need in pipeline[name].needs(config)}
    return digest({"settings": settings, "sources": sources, "files": _stamps(config) if name == "label" else []})


def _settings(config: Config, tree: dict[str, Any], name: str) -> dict[str, Any]:
    decided = {"seed": tree["seed"], **{section: tree[section] for section in SECTIONS[name]}}
    if name in ("score", "partition"):
        decided["partitioned"] = config.partitioned
    if name == "score" and config.warms_up:
        decided["warmup"] = {field: tree["sft"][field] for field in WARMUP}
    if name == "grpo" and config.grpo.judged:
        judges = {judge.name for judge in config.judges}
        decided["judges"] = [teacher for teacher in tree["label"]["teachers"] if teacher["name"] in judges]
    if name == "evaluate":
        decided["models"] = config.evaluated
    return decided


def _stamps(config: Config) -> list[Any]:
    sources = [*config.data.train, *config.data.test]
    paths = [Path(path) for source in sources if (path := getattr(source, "path", None))]
    return [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in paths if path.is_file()]
