"""The model card describes method, data and results, without secrets."""

from __future__ import annotations

from dataclasses import replace

import yaml

from lorapar_ray.config import Config
from lorapar_ray.exporting.card import model_card
from lorapar_ray.redact import remember_config
from lorapar_ray.reporting.data import RunData
from lorapar_ray.result_stages import RESULTS, RunState
from lorapar_ray.standing import Standing

TREE = {
    "name": "sums",
    "seed": 3,
    "model": {"path": "owner/base", "system_prompt": "Say one number.", "quantization": "nf4", "dtype": "bfloat16"},
    "data": {"train": [{"reader": "file", "path": "rows.jsonl"}]},
    "grpo": {"learning_rate": 1e-5},
    "label": {
        "quorum": 1,
        "calibration": "batch",
        "teachers": [{"kind": "remote", "name": "t", "model": "m", "base_url": "https://u:hunter22@x.org"}],
    },
    "evaluate": {"max_new_tokens": 64, "tasks": ["mmlu@5"]},
}


def run() -> RunData:
    def accuracy(right: int) -> dict[str, object]:
        return {"accuracy": right / 40, "interval": [0.1, 0.9], "n": 40}

    return RunData(
        state=RunState(dict.fromkeys(RESULTS, Standing("done")), {}),
        stages={},
        labels={"split": {"1": 30, "2": 12}},
        partition={"theta": 0.9, "total": {"shares": {"shared": 0.25}}},
        systems=None,
        scatter=None,
        sft=[],
        grpo=[],
        samples=[],
        accuracy={"base": accuracy(10), "sft": accuracy(30)},
        right={
            "base": {str(each): each < 10 for each in range(40)},
            "sft": {str(each): each < 30 for each in range(40)},
        },
    )


def test_the_card() -> None:
    remember_config(TREE)
    config = Config.model_validate(TREE)
    text = model_card(config, run(), "sft", merged=None)
    front = yaml.safe_load(text.split("---")[1])
    assert front["base_model"] == "owner/base" and front["library_name"] == "peft"
    for part in (
        "stages sft, seed 3",
        "`rows.jsonl`",
        "30 of System 1, 12 of System 2",
        "at θ = 0.9: shared 25.0%",
        "| stage 1 (SFT) | 75.0% | 10.0% – 90.0% | 40 |",
        "20 questions gained, 0 lost, exact McNemar p = 1.9e-06; this is a gain.",
        "learning_rate: 1.0e-05",
        "system_prompt: Say one number.",
        "quantization: nf4",
        "dtype: bfloat16",
        "calibration: batch",
        "base_url: https://***@x.org",
        "max_new_tokens: 64",
    ):
        assert part in text, part
    assert "hunter22" not in text
    cut = {"theta": 0.8, "systems": {"1": {"share": 0.2}, "2": {"share": 0.15}}}
    of_systems = model_card(config, replace(run(), partition=None, systems=cut), "sft", merged=None)
    assert "at θ = 0.8: System 1 trains 20.0%, System 2 trains 15.0%." in of_systems
    whole = model_card(config, run(), "grpo", merged="bfloat16")
    assert yaml.safe_load(whole.split("---")[1])["library_name"] == "transformers"
    assert "This is a merged model in bfloat16, trained" in whole


def test_results_on_tasks_alone_and_settings_that_are_out_of_date() -> None:
    share = {"metric": "acc", "filter": "none", "accuracy": 0.25, "interval": [0.2, 0.3], "n": 400, "asked": "mmlu@5"}
    shares = [share | {"task": name} for name in ["mmlu", *(f"mmlu_{number}" for number in range(57))]]
    pass_at = share | {"task": "humaneval", "metric": "pass@1", "filter": "create_test", "asked": "humaneval"}
    tasks = replace(run(), accuracy={}, right={}, shares={"grpo": [*shares, pass_at]})
    config = Config.model_validate(TREE)
    text = model_card(config, tasks, "grpo", merged=None)
    assert "## Results" in text and "Greedy answers" not in text
    assert "| mmlu | acc | stage 2 (GRPO) | 25.0% | 20.0% – 30.0% | 400 |" in text
    assert "| humaneval | pass@1 (create_test) | stage 2 (GRPO) | 25.0% |" in text
    assert text.count("| mmlu") == 12
    standings = {**run().state.standings, "evaluate": Standing("changed", ("evaluate.max_new_tokens 64 → 65",))}
    old = replace(tasks, state=RunState(standings, {"evaluate": ("…",)}))
    text = model_card(config, old, "grpo", merged=None)
    assert "## Results" not in text and "max_new_tokens" not in text and "calibration: batch" in text
