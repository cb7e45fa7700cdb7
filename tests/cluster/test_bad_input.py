"""Every kind of bad input through the CLI gives one line, a non-zero exit status, and loses nothing."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.chaos import Recovery
from tests.e2e.twin import ends_as_its_twin
from tests.tiny_run import lorapar, lorapar_here, tiny_config, write_config
from tests.together import tasks_here

pytestmark = pytest.mark.cluster


@pytest.fixture
def config(student: Path, tmp_path: Path) -> dict[str, Any]:
    """A config whose labels need no engine."""
    plain = tiny_config(student)
    return {**plain, "label": {"strategy": "random"}}


def refused(stage: str, config: dict[str, Any], folder: Path, *culprits: str, **environment: str) -> None:
    """Run a stage, in a separate process if it needs its own environment; one line must name every cause."""
    path = write_config(folder / "config.yaml", config)
    arguments = (stage, path) if stage == "run" else (stage, "-c", path)
    whole = (*arguments, "-d", folder / "run")
    done = lorapar(*whole, timeout=500, **environment) if environment else lorapar_here(*whole)
    lines = [line for line in done.stderr.splitlines() if line.startswith("lorapar:")]
    assert done.returncode == 2, done.stderr[-1500:]
    assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr[-1500:]
    for culprit in culprits:
        assert culprit in lines[0], lines[0]


@pytest.mark.parametrize(
    ("section", "change", "culprits"),
    [
        ("partition", {"thetta": 0.5}, ["unknown field 'partition.thetta'"]),
        ("partition", {"theta": "high"}, ["'partition.theta'", "'high'"]),
        ("partition", {"theta": 1.5}, ["'partition.theta'", "1.5"]),
        ("partition", {"theta": 0}, ["'partition.theta'", "0"]),
        ("partition", {"alpha": -0.1}, ["'partition.alpha'", "-0.1"]),
        ("data", {"train": []}, ["'data.train'"]),
        ("label", {"strategy": "vote", "teachers": []}, ["at least one teacher"]),
        ("adapter", {"method": "ia3"}, ["adapter.method", "nothing to partition", "order to [sft]"]),
        ("sft", {"patience": 2}, ["'sft'", "patience", "sft.validation above 0"]),
    ],
)
def test_fields(
    section: str, change: dict[str, Any], culprits: list[str], config: dict[str, Any], tmp_path: Path
) -> None:
    refused("run", {**config, section: {**config[section], **change}}, tmp_path, "config.yaml", *culprits)


def test_a_missing_config(tmp_path: Path) -> None:
    done = lorapar_here("run", tmp_path / "nowhere.yaml")
    assert done.returncode == 2 and "nowhere.yaml': no such file" in done.stderr


def file_source(folder: Path, *rows: dict[str, Any]) -> dict[str, Any]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"train": [{"reader": "file", "path": str(path)}]}


def test_a_missing_data_file(config: dict[str, Any], tmp_path: Path) -> None:
    source = {"train": [{"reader": "file", "path": "nowhere.jsonl"}]}
    refused("label", {**config, "data": source}, tmp_path, "data.train[0]", "nowhere.jsonl")


def test_an_empty_dataset(config: dict[str, Any], tmp_path: Path) -> None:
    refused("label", {**config, "data": file_source(tmp_path)}, tmp_path, "data.train[0]", "holds no rows")


def test_a_row_without_an_answer(config: dict[str, Any], tmp_path: Path) -> None:
    rows = file_source(tmp_path, {"prompt": "q", "answer": "1"}, {"prompt": "p"})
    refused("label", {**config, "data": rows}, tmp_path, "rows.jsonl' row 1 has no answer", "fields")


@pytest.mark.fault("label", "full disk")
def test_a_full_disk_keeps_the_run_and_the_next_try_finishes(
    config: dict[str, Any], recovery: Recovery, labelled_once: Path, tmp_path: Path
) -> None:
    fault = tmp_path / "fault"
    fault.mkdir()
    (fault / "sitecustomize.py").write_text(FULL_DISK)
    refused("label", config, tmp_path, "no space left on the disk of", "part-00000.parquet", PYTHONPATH=str(fault))
    assert (tmp_path / "run" / "data" / "train.parquet").is_file()
    with recovery("label", "full disk"):
        again = lorapar_here("label", "-c", tmp_path / "config.yaml", "-d", tmp_path / "run")
    assert again.returncode == 0, again.stderr
    ends_as_its_twin("label", tmp_path / "run", labelled_once / "run")


FULL_DISK = '''
"""Fault injection: the disk is full when the labels are to be written."""
import errno
import pathlib

replace = pathlib.Path.replace


def full(self, target):
    if pathlib.Path(target).name == "part-00000.parquet":
        raise OSError(errno.ENOSPC, "No space left on device")
    return replace(self, target)


pathlib.Path.replace = full
'''


def test_a_run_directory_of_another_config_and_stages_out_of_order(config: dict[str, Any], tmp_path: Path) -> None:
    refused("score", config, tmp_path, "stage 'label' has not finished", "lorapar label")
    other = {**config, "data": file_source(tmp_path, {"prompt": "q", "answer": "1"})}
    refused("label", other, tmp_path, "belongs to another config", "data differs")


def test_no_ray(config: dict[str, Any], tmp_path: Path) -> None:
    nobody = "127.0.0.1:1"
    refused("run", config, tmp_path, f"no Ray at RAY_ADDRESS={nobody}", "ray start --head", RAY_ADDRESS=nobody)


@pytest.fixture
def labelled(cluster: None, labelled_once: Path, tmp_path: Path) -> Path:
    """A copy for each test, so that no test sees another's results of `score`."""
    return Path(shutil.copytree(labelled_once, tmp_path / "labelled"))


@pytest.fixture(scope="module")
def labelled_once(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labelled")
    config = {**tiny_config(student), "label": {"strategy": "random"}}
    done = lorapar_here("label", "-c", write_config(folder / "config.yaml", config), "-d", folder / "run")
    assert done.returncode == 0, done.stderr
    return folder


def test_a_model_without_the_target_modules(labelled: Path, config: dict[str, Any]) -> None:
    with tasks_here():
        refused(
            *("score", {**config, "adapter": {"targets": ["w_none"]}}, labelled),
            *("'w_none' matches no layer", "down_proj"),
        )


def test_scores_that_are_all_zero(labelled: Path, config: dict[str, Any]) -> None:
    with tasks_here():
        refused(
            "score", {**config, "adapter": {"warmup_steps": 0}}, labelled, "every importance score is zero", "warmup"
        )


def test_a_cluster_that_is_too_small(labelled: Path, config: dict[str, Any]) -> None:
    greedy = {**config["score"], "resources": {"cpus": 999}}
    refused("score", {**config, "score": greedy}, labelled, "score: asks for", "999", "the cluster has")


def test_a_missing_model(cluster: None, config: dict[str, Any], tmp_path: Path) -> None:
    path = write_config(tmp_path / "config.yaml", {**config, "model": {"path": "./no/such/model"}})
    assert lorapar_here("label", "-c", path, "-d", tmp_path / "run").returncode == 0
    refused("score", {**config, "model": {"path": "./no/such/model"}}, tmp_path, "model './no/such/model'")
