"""Runs that the first manifest format recorded stay done, and say what differs."""

import shutil
from pathlib import Path

from tests.unit.faked_run import Cli, everything
from tests.unit.faked_stages import lorapar

LEGACY = Path(__file__).parent / "legacy_run"
"""A whole run in the first format, with faked bodies."""


def test_a_run_of_the_first_format_is_done_and_says_what_differs(cli: Cli, tmp_path: Path) -> None:
    shutil.copytree(LEGACY, cli.run.root)
    config = cli.run.root / "as-given.yaml"
    status, said = lorapar("run", config, "-d", cli.run.root)
    assert status == 0 and "nothing to do" in said, said
    assert cli.run.manifest()["format"] == 2
    for override, why in (
        ("partition.theta=0.5", "partition.theta 0.9 → 0.5"),
        ("grpo.learning_rate=1e-5", "grpo.learning_rate 0.001 → 1e-5"),
        ("sft.batch_size=8", "sft.batch_size 4 → 8"),
    ):
        status, said = lorapar("run", config, "-d", cli.run.root, "--set", override)
        assert status == 2 and why in said, said
    assert "nothing to do" in lorapar("run", config, "-d", cli.run.root, "--set", "grpo.learners=2")[1]


def test_a_stage_of_the_first_format_under_other_settings_is_kept(cli: Cli) -> None:
    shutil.copytree(LEGACY, cli.run.root)
    before = everything(cli.run.grpo)
    status, said = lorapar(
        "grpo", "-c", cli.run.root / "as-given.yaml", "-d", cli.run.root, "--set", "grpo.learning_rate=1e-5"
    )
    assert status == 2 and "grpo.learning_rate 0.001 → 1e-5" in said, said
    assert everything(cli.run.grpo) == before
