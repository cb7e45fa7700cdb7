"""Stage 2 with an environment of several turns: real engine, real learner, real environment worker.

The engine reads the policies from the learner's memory.
"""

from pathlib import Path

import pytest

from tests.e2e.conftest import FinishedRun
from tests.e2e.environments import TURNS
from tests.e2e.test_interruption import copy_before
from tests.tiny_run import lorapar_here, metrics

pytestmark = pytest.mark.e2e


def test_episodes_of_several_turns_are_trained_on_as_the_engine_sampled_them(
    cluster: None, finished: FinishedRun, tmp_path: Path
) -> None:
    run = copy_before(finished, "grpo", tmp_path / "run")
    changed = {
        "environment": "tests.e2e.environments:three_turns",
        "rewards": "[{name: environment}]",
        "max_completion_length": "96",
        "top_k": "20",
        "top_p": "0.9",
        "steps": "2",
        "policy_transport": "direct",
    }
    settings = [part for name, value in changed.items() for part in ("--set", f"grpo.{name}={value}")]
    done = lorapar_here("grpo", "-c", finished.config, "-d", run, *settings)
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = metrics(run, "grpo")
    assert first["environment_failures"] == 1 and second["environment_failures"] == 0
    for line in (first, second):
        assert line["turns"] == TURNS and line["completion_length"] <= 4 * TURNS < line["trajectory_length"]
        assert line["reward"] == line["reward/environment"] > 0
        assert line["logprob_gap"] <= 1e-3  # of every turn, after the environment's tokens, over the kept sets
        assert 0.99 <= line["ratio_min"] <= line["ratio_max"] <= 1.01
    assert (run / "grpo" / "adapter" / "adapter_model.safetensors").is_file()
