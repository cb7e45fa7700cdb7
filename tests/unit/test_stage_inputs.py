"""What makes a stage's results those of other inputs: settings, files by their contents, and the user's own code."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from lorapar_ray.runs import RunDirectory
from tests.tiny_run import write_config
from tests.unit.faked_run import Cli, digests
from tests.unit.faked_stages import lorapar


def test_an_input_is_known_by_its_content(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_text("one")
    cli.tree |= {
        "data": {"train": [{"reader": "file", "path": "~/rows.jsonl"}]},
        "adapter": {"init": "adapter", "path": "~/adapter"},
        "model": {"path": str(tmp_path / "student")},
    }
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "config.json").write_text("{}")
    for stage in ("label", "score", "partition", "sft"):
        assert cli(stage)[0] == 0
    for path in (tmp_path / "rows.jsonl", adapter / "adapter_model.safetensors", tmp_path / "student" / "config.json"):
        os.utime(path, (1, 1))
    (adapter / "README.md").write_text("about it")
    for stage in ("label", "score", "sft"):
        assert cli(stage)[1].startswith(f"✓ {stage}: done")
    for path, stage, name in (
        (tmp_path / "student" / "config.json", "sft", str(tmp_path / "student")),
        (adapter / "adapter_model.safetensors", "score", "~/adapter"),
        (tmp_path / "rows.jsonl", "label", "~/rows.jsonl"),
    ):
        path.write_text("two")
        status, said = cli(stage)
        assert status == 2 and f"'{name}' has changed" in said, said
    (tmp_path / "rows.jsonl").unlink()  # moved away: nothing to compare, and nothing lost
    assert cli("label")[1].startswith("✓ label: done")


TEACHERS = "label.teachers=[{name: a, model: x/y, cost_per_hour: %d}]"


UNPARTITIONED = ("sft.masked=false", "grpo.masked=false")


@pytest.mark.parametrize(
    ("stage", "base", "unused", "in_use"),
    [
        ("label", [], [TEACHERS % 1], ["label.strategy=single", TEACHERS % 1]),
        ("label", [], ["label.calibration=batch", "label.prompt.task=Decide."], ["label.definitions.1=other"]),
        (
            "label",
            ["label.strategy=vote", TEACHERS % 1],
            [TEACHERS % 2, "label.calibration_rows=9"],
            [TEACHERS % 2, "label.sequential=true"],
        ),
        ("sft", [], ["sft.validate_every=3", "sft.keep=last"], ["sft.validate_every=3", "sft.validation=0.5"]),
        ("score", UNPARTITIONED, ["score.criterion=fisher", "score.max_length=9"], ["sft.masked=true"]),
        ("score", UNPARTITIONED, ["partition.theta=0.5"], ["partition.theta=0.5", "sft.masked=true"]),
    ],
)
def test_a_setting_that_changes_nothing_beside_the_others_refuses_nothing(
    stage: str, base: Sequence[str], unused: list[str], in_use: list[str], cli: Cli
) -> None:
    """Also where a run has recorded it, or had none."""

    def run(*settings: str) -> tuple[int, str]:
        chosen = {each.partition("=")[0]: each for each in settings}
        return cli("run", *(part for each in chosen.values() for part in ("--set", each)))

    assert run(*base)[0] == 0
    assert "nothing to do" in run(*base, *unused)[1]
    status, said = run(*base, *in_use)
    assert status == 2 and said.startswith(f"{stage}: has results of other inputs ("), said


@pytest.fixture
def own_files(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward, an environment, a teacher and a task of the user's own in a run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_package").mkdir()
    (tmp_path / "own_package" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    for name in ("own_reward.py", "own_package/played.py", "own_teacher.py", "own_functions.py"):
        (tmp_path / name).write_text("raise RuntimeError('imported')\n")
    (tmp_path / "own_task.yaml").write_text("include: base\nprocess_docs: !function own_functions.good\n")
    (tmp_path / "base").write_text("dataset_path: json\ndataset_kwargs: {data_files: {test: own.jsonl}}\n")
    (tmp_path / "own.jsonl").write_text("{}")
    cli.tree |= {
        "label": {"teachers": [{"name": "mine", "kind": "python", "model": "own_teacher:Mine"}]},
        "grpo": {
            "rewards": [{"name": "own_reward:good"}, {"name": "absent.module:reward"}, {"name": "environment"}],
            "environment": "own_package.played:rollout",
        },
        "evaluate": {"tasks": ["own_task.yaml@2", "gsm8k"], "models": ["base"]},
    }


OWN_FILES = (
    ("own_teacher.py", "label", "module own_teacher"),
    ("own_reward.py", "grpo", "module own_reward"),
    ("own_package/played.py", "grpo", "module own_package.played"),
    ("own_task.yaml", "evaluate", "own_task.yaml"),
    ("base", "evaluate", "base"),
    ("own_functions.py", "evaluate", "own_functions.py"),
    ("own.jsonl", "evaluate", "own.jsonl"),
)


@pytest.mark.usefixtures("own_files")
def test_the_users_own_code_and_tasks_are_inputs(cli: Cli, tmp_path: Path) -> None:
    """Nothing of them is imported to know it."""
    assert cli("run")[0] == 0
    assert "nothing to do" in cli("run")[1]
    for file, stage, name in OWN_FILES:
        before = (tmp_path / file).read_text()
        (tmp_path / file).write_text(before + " ")
        status, said = cli("run")
        assert status == 2 and said.startswith(f"{stage}: ") and f"'{name}' has changed" in said, said
        (tmp_path / file).write_text(before)
    assert "nothing to do" in cli("run")[1]


@pytest.mark.usefixtures("own_files")
def test_a_run_that_recorded_none_of_the_users_code_stays_done(cli: Cli, tmp_path: Path) -> None:
    assert cli("run")[0] == 0
    manifest = json.loads(cli.run.manifest_path.read_text())
    names = {name for _, _, name in OWN_FILES}
    for entry in manifest["stages"].values():
        entry["inputs"]["files"] = {
            name: known for name, known in entry["inputs"]["files"].items() if name not in names
        }
    cli.run.manifest_path.write_text(json.dumps(manifest))
    for file, _, _ in OWN_FILES:
        (tmp_path / file).write_text("other: text")
    assert "nothing to do" in cli("run")[1]


def test_an_unreadable_input_loses_no_labels(tmp_path: Path) -> None:
    """With the real stage."""
    rows, run = tmp_path / "rows.jsonl", RunDirectory(tmp_path / "run")
    rows.write_text("".join(json.dumps({"prompt": f"q{number}", "answer": "1"}) + "\n" for number in range(9)))
    data = {
        "train": [{"reader": "file", "path": str(rows)}],
        "test": [{"reader": "file", "path": str(rows), "rows": 1}],
    }
    tree = {"name": "r", "model": {"path": "a/b"}, "data": data, "label": {"strategy": "random"}}
    label = ("label", "-c", write_config(tmp_path / "c.yaml", tree), "-d", run.root)
    assert lorapar(*label)[0] == 0
    before, entry, text = digests(run.root), run.entry("label"), rows.read_text()
    rows.write_text(text + "{")
    for more in ((), ("--redo", "label")):
        assert lorapar(*label, *more)[0] == 2
        assert digests(run.root) == before and run.entry("label") == entry
    rows.unlink()
    status, said = lorapar(*label, "--redo", "label")
    assert status == 2 and str(rows) in said, said
    assert digests(run.root) == before and run.entry("label") == entry
    rows.write_text(text)
    assert lorapar(*label, "--redo", "label")[0] == 0
    assert run.entry("label")["outputs"] == entry["outputs"]
