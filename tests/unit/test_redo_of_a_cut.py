"""A training stage depends on its own mask alone: another β leaves stage 1 as it is, another α stage 2.

Only the cut is real; the other stages' bodies are faked (see `faked_stages`).
"""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from lorapar_ray.files import digest
from lorapar_ray.importance.halves import Halves, save_halves
from lorapar_ray.partition.stage import STAGE
from lorapar_ray.pipeline import PIPELINE
from lorapar_ray.runs import RunDirectory
from lorapar_ray.stages import OUTPUTS_FOR
from tests.tiny_run import tiny_config, write_config
from tests.unit.faked_stages import lorapar, use_fakes
from tests.unit.partition_scores import skewed


class Cli:
    """A run with scores of both Systems."""

    def __init__(self, folder: Path, order: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        use_fakes(monkeypatch)
        monkeypatch.setitem(PIPELINE, "partition", STAGE)
        tree: dict[str, Any] = {**tiny_config(Path("no/such/student")), "order": order}
        self.config = write_config(folder / "config.yaml", tree)
        self.run = RunDirectory(folder / "run")
        assert self("label")[0] == self("score")[0] == 0
        for system in (1, 2):
            save_file(skewed(system), self.run.scores / f"system{system}.safetensors")
        save_halves(self.run.scores / "halves", [Halves((8, 8), tuple(skewed(seed) for seed in (1, 1, 2, 2)))])

    def __call__(self, command: str, *more: str) -> tuple[int, str]:
        return lorapar(command, "-c", self.config, "-d", self.run.root, *more)


@pytest.mark.parametrize(
    ("order", "other", "stays", "changes"),
    [
        (["sft", "grpo"], "partition.beta=0.25", "sft", "grpo"),
        (["grpo", "sft"], "partition.alpha=0.25", "grpo", "sft"),
    ],
)
def test_a_stage_whose_mask_is_the_same_stays_done(
    order: list[str], other: str, stays: str, changes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli = Cli(tmp_path, order, monkeypatch)
    assert cli("run")[0] == 0
    before, cut = cli.run.entry(stays), cli.run.entry("partition")["outputs"]
    status, said = cli("run", "--redo", "partition", "--set", other)
    assert status == 0 and f"✓ {stays}: done" in said, said
    assert cli.run.entry(stays) == before and cli.run.entry("partition")["outputs"] != cut
    assert cli.run.entry(changes)["inputs"]["sources"]["partition"] != before["inputs"]["sources"]["partition"]
    status, said = cli(stays, "--set", "partition.theta=0.3", "--set", other)
    assert status == 2 and "partition.theta" in said, said
    status, said = cli("partition", "--redo", "partition", "--set", "partition.theta=0.3", "--set", other)
    assert status == 0, said
    status, said = cli(stays, "--set", "partition.theta=0.3", "--set", other)
    assert status == 2 and "partition has other results" in said, said


def test_a_run_that_recorded_the_whole_cut_stays_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the same cut is made again."""
    cli = Cli(tmp_path, ["sft", "grpo"], monkeypatch)
    assert cli("run")[0] == 0
    manifest = json.loads(cli.run.manifest_path.read_text())
    whole = manifest["stages"]["partition"]["outputs"]
    for stage in ("sft", "grpo"):
        manifest["stages"][stage]["inputs"]["sources"]["partition"] = whole
    del manifest["stages"]["partition"][OUTPUTS_FOR]
    cli.run.manifest_path.write_text(json.dumps(manifest))
    assert "nothing to do" in cli("run")[1]
    assert cli("run", "--redo", "partition")[0] == 0 and OUTPUTS_FOR in cli.run.entry("partition")
    assert cli.run.entry("sft")["inputs"]["sources"]["partition"] == whole and "nothing to do" in cli("run")[1]
    manifest["stages"]["sft"]["inputs"]["sources"]["partition"] = digest("another cut")
    cli.run.manifest_path.write_text(json.dumps(manifest))
    status, said = cli("run")
    assert status == 2 and "sft: has results of other inputs (partition has other results)" in said, said
