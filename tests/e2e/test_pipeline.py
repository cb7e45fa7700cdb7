"""The whole pipeline on a tiny student with real engines, and checks of its results."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pyarrow.dataset
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lorapar_ray.config_file import load_config
from lorapar_ray.datasets.rows import read_table
from lorapar_ray.errors import UserError
from lorapar_ray.exporting.job import export
from lorapar_ray.partition import load_regions, stage_mask
from lorapar_ray.pipeline import STAGES
from lorapar_ray.runs import RunDirectory
from tests.e2e.conftest import FinishedRun
from tests.pissa import trained_pissa
from tests.tiny_run import GRPO_STEPS, ROOT, lorapar_here, metrics

pytestmark = pytest.mark.e2e
TOKENS = [1, 504, 216, 33, 1043, 28, 7, 99, 2048, 12, 345]
TOLERANCE = 2e-4
"""Nats between stock peft and stock vLLM, both in float32 (measured: below 2e-5)."""


def test_every_stage_finishes(finished: FinishedRun) -> None:
    assert finished.status == 0, finished.output
    stages = json.loads((finished.run / "manifest.json").read_text())["stages"]
    assert {name: stages[name]["status"] for name in STAGES} == dict.fromkeys(STAGES, "done")
    assert "stage 2's engines answer" in finished.output
    assert re.findall(r".*(?:\(raylet\)|Warning|it/s|%\|).*", finished.output) == []
    page = (finished.run / "report" / "index.html").read_text()
    assert "Not run yet" not in page
    assert 'src="http' not in page and 'href="http' not in page


def test_no_temporary_file_is_left(finished: FinishedRun) -> None:
    assert finished.left == []


def test_real_engines_voted_on_every_row(finished: FinishedRun) -> None:
    rows = read_table(finished.run / "labels")
    ids = {row["id"] for row in read_table(finished.run / "data" / "train.parquet")}
    assert len(rows) == len(ids) == len({row["id"] for row in rows})
    assert {row["system"] for row in rows} == {1, 2}
    assert all(sorted(vote["teacher"] for vote in row["votes"]) == ["a", "b"] for row in rows)
    assert all(0.5 <= vote["confidence"] <= 1 for row in rows for vote in row["votes"])


@pytest.mark.parametrize(
    ("stage", "before", "after"), [(1, "adapter", "sft/adapter"), (2, "sft/adapter", "grpo/adapter")]
)
def test_a_stage_changes_its_region_and_not_one_bit_outside(
    finished: FinishedRun, stage: int, before: str, after: str
) -> None:
    old, new = (load_file(finished.run / folder / "adapter_model.safetensors") for folder in (before, after))
    mask = stage_mask(load_regions(finished.run / "partition" / "regions.safetensors")[0], stage=stage)
    assert old.keys() == new.keys() == mask.keys()
    moved = 0
    for key, active in mask.items():
        assert torch.equal(old[key].view(torch.int32)[~active], new[key].view(torch.int32)[~active]), key
        moved += int((old[key] != new[key])[active].sum())
    assert moved > 0.9 * sum(int(active.sum()) for active in mask.values())


def test_both_stages_learn(finished: FinishedRun) -> None:
    """A sign error in a loss, shuffled advantages, or a mask that trains nothing makes this fail."""
    losses = [line["loss"] for line in metrics(finished.run, "sft")]
    assert losses[0] > 11 and fmean(losses[-4:]) < 9
    rewards = [line["reward"] for line in metrics(finished.run, "grpo")]
    assert fmean(rewards[:2]) < 0.4 and fmean(rewards[-2:]) > 0.7


@pytest.fixture(scope="module")
def pissa(finished: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A PiSSA adapter after some training, exported for the original base; and log-probabilities on its residual."""
    folder = tmp_path_factory.mktemp("pissa")
    model = trained_pissa(finished.student, folder, drift=0.1)
    return folder / "plain", logprobs(model)


@pytest.fixture(scope="module")
def served(finished: FinishedRun, pissa: tuple[Path, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Log-probabilities by stock vLLM: one engine, a stock LoRA request for each adapter."""
    adapters = {"sft": finished.run / "sft/adapter", "grpo": finished.run / "grpo/adapter", "pissa": pissa[0]}
    script = Path(__file__).with_name("vllm_logprobs.py")
    command = [sys.executable, script, finished.student, json.dumps(TOKENS), *adapters.values()]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    settings["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # one process imports it, not three
    settings["TORCHDYNAMO_DISABLE"] = "1"  # its small operators run as they are, instead of being compiled for seconds
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=os.environ | settings, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return {name: torch.tensor(values) for name, values in zip(adapters, found, strict=True)}


@pytest.mark.parametrize("name", ["sft", "grpo", "pissa"])
def test_adapters_say_the_same_in_stock_peft_and_stock_vllm(
    name: str, finished: FinishedRun, pissa: tuple[Path, torch.Tensor], served: dict[str, torch.Tensor]
) -> None:
    adapter = pissa[0] if name == "pissa" else finished.run / name / "adapter"
    base = AutoModelForCausalLM.from_pretrained(finished.student, dtype=torch.float32)
    plain = logprobs(base)
    tuned = logprobs(PeftModel.from_pretrained(base, str(adapter)))
    assert (tuned - served[name]).abs().max() < TOLERANCE
    assert (plain - tuned).abs().max() > 10 * TOLERANCE
    if name == "pissa":
        assert (tuned - pissa[1]).abs().max() < TOLERANCE


def test_what_is_exported_says_the_same(finished: FinishedRun, tmp_path: Path) -> None:
    run = RunDirectory(finished.run)
    config = load_config(finished.run / "config.yaml", [])
    adapter, whole = tmp_path / "adapter", tmp_path / "whole"
    assert export(config, run, adapter) == "grpo" and export(config, run, whole, "sft", merged=True) == "sft"
    base = AutoModelForCausalLM.from_pretrained(finished.student, dtype=torch.float32)
    same = logprobs(PeftModel.from_pretrained(base, str(finished.run / "grpo/adapter")))
    base = AutoModelForCausalLM.from_pretrained(finished.student, dtype=torch.float32)
    assert torch.equal(logprobs(PeftModel.from_pretrained(base, str(adapter))), same)
    base = AutoModelForCausalLM.from_pretrained(finished.student, dtype=torch.float32)
    tuned = logprobs(PeftModel.from_pretrained(base, str(finished.run / "sft/adapter")))
    merged = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32)
    assert (logprobs(merged) - tuned).abs().max() < TOLERANCE
    assert "95 % Wilson intervals" in (adapter / "README.md").read_text()
    with pytest.raises(UserError, match="already exists"):
        export(config, run, adapter)
    with pytest.raises(UserError, match="stage 'sft' has not finished"):
        export(config, RunDirectory(tmp_path / "none"), tmp_path / "other", "sft")


def logprobs(model: torch.nn.Module) -> torch.Tensor:
    """Log-probability of each token of TOKENS after the first."""
    with torch.no_grad():
        rows = model(torch.tensor([TOKENS])).logits.log_softmax(-1)[0, :-1]
    return rows.gather(1, torch.tensor(TOKENS[1:])[:, None])[:, 0]


def test_the_served_policy_was_proved_at_every_step(finished: FinishedRun) -> None:
    lines = metrics(finished.run, "grpo")
    assert [line["policy_version"] for line in lines] == list(range(1, GRPO_STEPS + 1))
    assert all(line["canary_gap"] < 1e-3 for line in lines)
    on_policy = [line for line in lines if "logprob_gap" in line]  # float32 throughout, nothing stale
    assert on_policy
    for line in on_policy:
        assert line["logprob_gap"] <= 1e-3
        assert 0.99 < line["ratio_min"] <= line["ratio_max"] < 1.01


@pytest.mark.parametrize("folder", ["data", "labels"])
def test_folders_of_data_hold_nothing_else(finished: FinishedRun, folder: str) -> None:
    assert pyarrow.dataset.dataset(finished.run / folder).count_rows() > 0


def test_a_second_run_has_nothing_to_do(finished: FinishedRun) -> None:
    again = lorapar_here("run", finished.config, "--run-dir", finished.run)
    assert again.returncode == 0
    assert "nothing to do" in again.stdout


def test_a_dry_run_shows_the_plan_and_writes_nothing(finished: FinishedRun, tmp_path: Path) -> None:
    shown = lorapar_here("run", finished.config, "--run-dir", tmp_path / "new", "--dry-run")
    assert shown.returncode == 0
    assert "rollout_actors: 1" in shown.stdout
    assert "1 × rollout engine (1 CPU + GPU auto), 1 × learner (1 CPU + GPU auto)" in shown.stdout
    assert not (tmp_path / "new").exists()


def test_recutting_needs_no_scoring_and_nothing_of_work(finished: FinishedRun, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished.run, tmp_path / "run"))
    shutil.rmtree(run / "work")
    command = ("partition", "-c", finished.config, "-d", run, "--theta")
    cut, before = ((folder / "partition" / "regions.safetensors").read_bytes() for folder in (run, finished.run))
    shown = lorapar_here(*command, "0.5,0.9")
    assert shown.returncode == 0, shown.stderr
    assert "θ 0.5" in shown.stdout and "θ 0.9" in shown.stdout
    assert shown.stdout.count("(random halves of the examples: ") == 2
    assert cut == before
    unasked = lorapar_here(*command, "0.5")
    assert unasked.returncode == 2 and "partition.theta 0.9 → 0.5" in unasked.stderr, unasked.stderr
    assert (run / "partition" / "regions.safetensors").read_bytes() == before
    recut = lorapar_here(*command, "0.5", "--redo", "partition")
    assert recut.returncode == 0 and "θ 0.5" in recut.stdout, recut.stderr
    summary, old = (json.loads((folder / "partition" / "summary.json").read_text()) for folder in (run, finished.run))
    assert summary["theta"] == 0.5
    assert [point["examples"] for point in summary["control"]] == [point["examples"] for point in old["control"]] != []
