"""The whole pipeline on a tiny student with real engines, and what must be true of what it leaves."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lorapar_ray.datasets.rows import read_table
from lorapar_ray.partition import load_regions, stage_mask
from lorapar_ray.runs import STAGES
from tests.e2e.conftest import FinishedRun
from tests.tiny_run import ROOT, lorapar, metrics

pytestmark = pytest.mark.e2e
TOKENS = [1, 504, 216, 33, 1043, 28, 7, 99, 2048, 12, 345]
TOLERANCE = 2e-4
"""Nats between stock peft and stock vLLM, both in float32 (measured: below 2e-5)."""


def test_every_stage_finishes(finished: FinishedRun) -> None:
    assert finished.log.returncode == 0, finished.log.stdout + finished.log.stderr
    stages = json.loads((finished.run / "manifest.json").read_text())["stages"]
    assert {name: stages[name]["status"] for name in STAGES} == dict.fromkeys(STAGES, "done")
    page = (finished.run / "report" / "index.html").read_text()
    assert "Not run yet" not in page
    assert 'src="http' not in page and 'href="http' not in page


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


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_adapters_say_the_same_in_stock_peft_and_stock_vllm(finished: FinishedRun, stage: str) -> None:
    adapter = finished.run / stage / "adapter"
    base = AutoModelForCausalLM.from_pretrained(finished.student, dtype=torch.float32)
    plain = base(torch.tensor([TOKENS])).logits.log_softmax(-1)[0, :-1]
    tuned = PeftModel.from_pretrained(base, str(adapter))(torch.tensor([TOKENS])).logits.log_softmax(-1)[0, :-1]
    ours = tuned.gather(1, torch.tensor(TOKENS[1:])[:, None])[:, 0]
    script = [
        sys.executable,
        Path(__file__).with_name("vllm_logprobs.py"),
        finished.student,
        adapter,
        json.dumps(TOKENS),
    ]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    done = subprocess.run(list(map(str, script)), capture_output=True, text=True, env=os.environ | settings, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = torch.tensor(json.loads(done.stdout.strip().splitlines()[-1]))
    assert (ours - theirs).abs().max() < TOLERANCE
    assert (plain - tuned).abs().max() > 10 * TOLERANCE


def test_the_served_policy_was_proved_at_every_step(finished: FinishedRun) -> None:
    lines = metrics(finished.run, "grpo")
    assert [line["policy_version"] for line in lines] == [1, 2, 3, 4]
    assert all(line["canary_gap"] < 1e-3 for line in lines)
    assert all(abs(line["ratio_mean"] - 1) < 1e-2 for line in lines if "ratio_mean" in line)


def test_a_second_run_has_nothing_to_do(finished: FinishedRun) -> None:
    again = lorapar("run", finished.config, "--run-dir", finished.run, timeout=60)
    assert again.returncode == 0
    assert "nothing to do" in again.stdout


def test_a_dry_run_shows_the_plan_and_writes_nothing(finished: FinishedRun, tmp_path: Path) -> None:
    shown = lorapar("run", finished.config, "--run-dir", tmp_path / "new", "--dry-run", timeout=60)
    assert shown.returncode == 0
    assert "rollout_actors: 1" in shown.stdout
    assert "1 × rollout engine (1 CPU), 1 × learner (1 CPU)" in shown.stdout
    assert not (tmp_path / "new").exists()


def test_recutting_at_another_theta_needs_no_scoring(finished: FinishedRun) -> None:
    before = (finished.run / "partition" / "regions.safetensors").read_bytes()
    shown = lorapar("partition", "-c", finished.config, "-d", finished.run, "--theta", "0.5,0.9", timeout=120)
    assert shown.returncode == 0, shown.stderr
    assert "θ 0.5" in shown.stdout and "θ 0.9" in shown.stdout
    assert (finished.run / "partition" / "regions.safetensors").read_bytes() == before
