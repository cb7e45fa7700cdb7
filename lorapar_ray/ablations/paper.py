"""The paper's figures (arXiv 2507.20999, table 4), of the model and data set that a grid's config names.

Two figures of an arm with two stages are those after the first and after the second.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lorapar_ray.ablations.grid import Grid
from lorapar_ray.config import Config


@dataclass(frozen=True)
class Figures:
    """What the paper reports beside a grid's table."""

    of: str
    """Model and benchmark."""
    base: str = ""
    """Accuracy of the untuned model, in percent; empty if there is none."""
    arms: Mapping[str, str] = field(default_factory=dict)
    """By arm."""


QWEN = Figures(
    "Qwen2.5-7B, GSM8K",
    "21.91",
    {
        "lora-1": "67.32",
        "lora-2": "68.61",
        "olora-1": "65.43",
        "olora-2": "67.32",
        "pissa-1": "55.80",
        "pissa-2": "57.24",
        "lora-rl": "67.25/69.83",
        "lora-par": "68.69/81.65",
    },
)
DOLLY = Figures(
    "LLaMA2-7B, MMLU after Dolly",
    "46.48",
    {
        "lora-1": "45.85",
        "lora-2": "44.99",
        "olora-1": "45.08",
        "olora-2": "45.06",
        "pissa-1": "22.95",
        "pissa-2": "23.27",
        "pissa-rl": "22.96/23.45",
        "lora-par": "46.34/47.09",
        "lora-par-pissa": "23.10/24.07",
        "lora-par-pissa-0.95": "23.33/24.14",
    },
)
PLATYPUS = Figures(
    "LLaMA2-7B, MMLU after Platypus",
    "46.48",
    {
        "lora-1": "43.36",
        "lora-2": "43.16",
        "olora-1": "45.16",
        "olora-2": "45.26",
        "pissa-1": "24.14",
        "pissa-2": "23.89",
        "pissa-rl": "23.98/23.92",
        "lora-par": "44.15/45.66",
        "lora-par-pissa": "24.11/25.01",
        "lora-par-pissa-0.95": "24.41/25.38",
    },
)
HUMANEVAL = Figures(
    "LLaMA2-7B, HumanEval",
    "14.39",
    {
        "lora-1": "15.37",
        "lora-2": "18.54",
        "olora-1": "15.85",
        "olora-2": "19.02",
        "pissa-1": "21.95",
        "pissa-2": "24.39",
        "pissa-rl": "21.34/25.61",
        "lora-par": "16.46/19.51",
        "lora-par-pissa": "22.56/26.22",
        "lora-par-pissa-0.95": "23.17/27.43",
    },
)
LLAMA_ON = {
    ("dolly", "mmlu"): DOLLY,
    ("openplatypus", "mmlu"): PLATYPUS,
    ("codealpaca", "humaneval"): HUMANEVAL,
    ("codefeedback", "humaneval"): HUMANEVAL,
}


def figures_of(grid: Grid, config: Config, task: str) -> Figures:
    """The figures of table 4 for a config's training data and model; else the grid's own, of GSM8K.

    Args:
        task: of lm-eval, by which the arms are compared; empty: the config's test rows.
    """
    readers = {source.reader for source in config.data.train}
    name, model = task.partition("@")[0], config.model.path.lower()
    if grid.name == "methods":
        found = [figures for known, figures in LLAMA_ON.items() if (readers, name) == ({known[0]}, known[1])]
        if found and "llama" in model:
            return found[0]
        if readers == {"gsm8k"} and name in ("", "gsm8k") and "qwen" in model:
            return QWEN
    if name not in ("", "gsm8k"):
        return Figures("7B")
    return Figures("7B", grid.base, {arm.name: arm.paper for arm in grid.arms})
