"""The model card: data, settings, regions and results of a run, with their intervals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

from lorapar_ray.config import Config
from lorapar_ray.redact import redacted
from lorapar_ray.reporting.data import MODELS, RunData
from lorapar_ray.reporting.page import in_order, verdicts
from lorapar_ray.text import shown

SHOWN = {
    "model": "score",
    "label": "label",
    "adapter": "score",
    "score": "score",
    "partition": "partition",
    "sft": "sft",
    "grpo": "grpo",
    "evaluate": "evaluate",
}
"""Config sections that describe the training and its results, and the stage that used each."""
MOST_SHARES = 12
"""Rows of a model on one task: lm-eval's groups come first, and MMLU has 57 subjects."""


def model_card(config: Config, run: RunData, stage: str, *, merged: str | None) -> str:
    """Markdown with the front matter that the hub reads.

    Only results that belong to what is in the run now are in it, and settings only of stages that have finished with
    them.

    Args:
        merged: the dtype of a merged model's weights; None: it is an adapter.
    """
    front = {
        "base_model": config.model.path,
        "library_name": "transformers" if merged else "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "lora-par"] + ([] if merged else ["peft"]),
    }
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n",
        f"# {config.name}: {MODELS[stage]}\n",
        _what(config, stage, merged),
        *_data(config, run),
        *_regions(run),
        *_results(config, run),
        *_settings(config, run),
    ]
    return shown("\n".join(parts))


def _what(config: Config, stage: str, merged: str | None) -> str:
    kind = f"a merged model in {merged}" if merged else f"a LoRA adapter for `{config.model.path}`"
    return (
        f"This is {kind}, trained with LoRA-PAR ([arXiv 2507.20999](https://arxiv.org/abs/2507.20999)) by "
        f"`lorapar_ray`: stages {', '.join(config.order[: config.order.index(stage) + 1])}, seed {config.seed}.\n"  # type: ignore[arg-type]
    )


def _data(config: Config, run: RunData) -> Iterator[str]:
    yield "## Data\n"
    for source in config.data.train:
        words = redacted(source.model_dump(mode="json", exclude_defaults=True))
        yield "- " + ", ".join(f"{key} `{value}`" for key, value in words.items())
    counts = (run.labels or {}).get("split") if run.state.stands("label") else None
    if isinstance(counts, dict):
        yield "\nLabelled: " + ", ".join(f"{count} of System {name}" for name, count in counts.items()) + "."
    yield ""


def _regions(run: RunData) -> Iterator[str]:
    if not run.state.stands("partition"):
        return
    if run.systems is not None:
        theta = run.systems["theta"]
        shares = {f"System {system} trains": each["share"] for system, each in run.systems["systems"].items()}
    elif run.partition is not None:
        theta, shares = run.partition["theta"], run.partition["total"]["shares"]
    else:
        return
    yield "## Regions\n"
    said = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
    yield f"Of the adapter's elements, at θ = {theta:g}: {said}.\n"


def _results(config: Config, run: RunData) -> Iterator[str]:
    if not (run.accuracy or run.shares) or not run.state.stands("evaluate"):
        return
    yield "## Results\n"
    yield from _on_test_rows(config, run) if run.accuracy else ()
    yield from _on_tasks(run) if run.shares else ()


def _on_test_rows(config: Config, run: RunData) -> Iterator[str]:
    yield "Greedy answers to held-out questions, with 95 % Wilson intervals.\n"
    yield "| | accuracy | 95 % interval | n |"
    yield "| --- | --- | --- | --- |"
    for name, found in run.accuracy.items():
        low, high = found["interval"]
        yield f"| {MODELS[name]} | {found['accuracy']:.1%} | {low:.1%} – {high:.1%} | {found['n']} |"
    yield ""
    yield from (f"- {each}" for each in verdicts(in_order(config, run.accuracy), run.right))
    yield ""


def _on_tasks(run: RunData) -> Iterator[str]:
    yield "Tasks of lm-eval, with 95 % intervals.\n"
    yield "| task | metric | | accuracy | 95 % interval | n |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for model, shares in run.shares.items():
        for asked in dict.fromkeys(share["asked"] for share in shares):
            for share in [each for each in shares if each["asked"] == asked][:MOST_SHARES]:
                low, high = share["interval"]
                metric = share["metric"] + ("" if share["filter"] in ("none", "") else f" ({share['filter']})")
                names = " | ".join(name.replace("|", "\\|") for name in (share["task"], metric, MODELS[model]))
                yield f"| {names} | {share['accuracy']:.1%} | {low:.1%} – {high:.1%} | {share['n']} |"
    yield ""


def _settings(config: Config, run: RunData) -> Iterator[str]:
    yield "## Settings\n"
    tree: dict[str, Any] = {
        name: getattr(config, name).model_dump(mode="json", exclude_defaults=True)
        for name, stage in SHOWN.items()
        if stage in run.state.standings and run.state.standings[stage].state == "done"
    }
    yield "```yaml"
    yield yaml.safe_dump(redacted({name: part for name, part in tree.items() if part}), sort_keys=False).rstrip()
    yield "```\n"
