"""The baselines' driver: every variant is a valid config, shared stages are made once, the table adds up."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from lorapar_ray.config import Config
from lorapar_ray.config_file import load_config
from lorapar_ray.pipeline import is_done, run_stage
from lorapar_ray.runs import RunDirectory
from tests.tiny_run import ROOT, tiny_config


@pytest.fixture(scope="module")
def baselines() -> ModuleType:
    spec = importlib.util.spec_from_file_location("baselines", ROOT / "jobs" / "baselines.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_variant_is_a_config_and_no_two_are_the_same(baselines: ModuleType) -> None:
    file = ROOT / "jobs" / "configs" / "mawps-svamp.yaml"
    configs = {name: load_config(file, changes).to_yaml() for name, changes in baselines.VARIANTS.items()}
    assert len(set(configs.values())) == len(configs)
    assert load_config(file, baselines.VARIANTS["random-mask"]).partitioned
    assert not load_config(file, baselines.VARIANTS["pissa"]).partitioned


def test_what_two_variants_share_is_made_once(baselines: ModuleType, tmp_path: Path) -> None:
    plain = tiny_config(Path("student")) | {"label": {"strategy": "random"}}
    config = Config.model_validate(plain)
    first, second, other = (RunDirectory(tmp_path / name) for name in ("a-1", "b-1", "c-2"))
    first.open(config)
    run_stage(config, first, "label")
    second.open(config)
    baselines.borrow(config, second, "label")
    assert is_done(config, second, "label")
    assert second.manifest()["stages"]["label"] == first.manifest()["stages"]["label"]
    assert {path.name: path.read_bytes() for path in second.labels.iterdir()} == {
        path.name: path.read_bytes() for path in first.labels.iterdir()
    }
    reseeded = config.model_copy(update={"seed": 99})
    other.open(reseeded)
    baselines.borrow(reseeded, other, "label")
    assert not is_done(reseeded, other, "label")


def test_the_table_adds_up_over_seeds(baselines: ModuleType, tmp_path: Path) -> None:
    for run, correct in (("lora-1", 30), ("lora-2", 50), ("lora-par-1", 45)):
        for folder in ("eval", "metrics"):
            (tmp_path / run / folder).mkdir(parents=True)
        (tmp_path / run / "config.yaml").write_text("order: [sft]\n")
        for name, right in (("base", 10), ("sft", correct)):
            result = {"correct": right, "n": 100, "accuracy": right / 100}
            (tmp_path / run / "eval" / f"{name}.json").write_text(json.dumps(result))
        line = {"step": 7, "seconds": 2.0, "active_share": 0.4}
        (tmp_path / run / "metrics" / "sft.jsonl").write_text((json.dumps(line) + "\n") * 7)
    lines = {line.split("|")[1].strip(): line for line in baselines.rows_of(tmp_path)}
    assert lines["base"].startswith("| base | – | – | 10.0% |")
    assert lines["lora"].startswith("| lora | 40.0% | 7 | 40.0% |") and lines["lora"].endswith(
        "| 200 | 30.0%, 50.0% | 14, 14 |"
    )
    assert "| 45.0% |" in lines["lora-par"] and "olora" not in lines
