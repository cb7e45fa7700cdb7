"""Guarantees of a run directory: one command at a time, no foreign file removed, checked results."""

import errno
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lorapar_ray import run_lock
from lorapar_ray.errors import UserError
from lorapar_ray.files import digest
from lorapar_ray.fingerprints import Fingerprints, meaning
from lorapar_ray.pipeline import STAGES
from lorapar_ray.runs import RunDirectory
from lorapar_ray.threads import meanwhile
from lorapar_ray.user_modules import user_modules
from tests.tiny_run import tiny_config, write_config
from tests.unit.faked_stages import in_a_child, lorapar, use_fakes


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "Cli":
    use_fakes(monkeypatch)
    return Cli(tmp_path)


class Cli:
    """A run whose stages do no work, and its config."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "rows.jsonl").write_text('{"prompt": "q", "answer": "1"}\n')
        self.tree: dict[str, Any] = {
            **tiny_config(Path("no/such/student")),
            "label": {"strategy": "random"},
            "data": {"train": [{"reader": "file", "path": str(folder / "rows.jsonl")}]},
        }
        self.run = RunDirectory(folder / "run")

    def __call__(self, command: str, *more: str | Path) -> tuple[int, str]:
        config = write_config(self.folder / "config.yaml", self.tree)
        return lorapar(command, "-c", config, "-d", self.run.root, *more)


def everything(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): path.read_text() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("way", ["new/../mine", "./mine/.", "link"])
def test_files_of_the_users_own_are_no_run_by_any_path(way: str, tmp_path: Path, cli: Cli) -> None:
    mine = tmp_path / "mine"
    for folder in ("data", "labels"):
        (mine / folder).mkdir(parents=True)
        (mine / folder / "thesis.txt").write_text("years of work")
    (tmp_path / "link").symlink_to(mine)
    before = everything(mine)
    cli.run = RunDirectory(tmp_path)
    status, said = lorapar("label", "-c", write_config(tmp_path / "c.yaml", cli.tree), "-d", f"{tmp_path}/{way}")
    assert status == 2 and "is not empty and holds no manifest.json" in said, said
    assert everything(mine) == before and not (tmp_path / "new").exists()


def test_a_home_directory_in_the_run_directory_is_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert lorapar("label", "-c", write_config(tmp_path / "c.yaml", cli.tree), "-d", "~/here")[0] == 0
    assert (tmp_path / "here" / "manifest.json").is_file()


@pytest.mark.parametrize(
    "where", ["x" * 300, "~no-such-user/run", "circle/run", "rows.jsonl/run", "/proc/run", "\udcff"]
)
def test_an_impossible_run_directory_is_one_line(where: str, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    run = where if where.startswith(("~", "/")) else tmp_path / where
    status, said = lorapar("label", "-c", write_config(tmp_path / "c.yaml", cli.tree), "-d", run)
    assert status == 2 and said.startswith("run directory") and "\n" not in said, said


def test_files_that_this_run_has_not_written_are_neither_removed_nor_mixed(cli: Cli) -> None:
    assert cli("label")[0] == 0
    cli.run.adapter.mkdir()
    (cli.run.adapter / "mine.safetensors").write_text("mine")
    for more in ((), ("--redo", "score")):
        status, said = cli("score", *more)
        assert status == 2 and "holds files that this run has not written" in said, said
    assert (cli.run.adapter / "mine.safetensors").read_text() == "mine"


def test_damage_is_named_with_the_stage_to_redo(cli: Cli) -> None:
    assert cli("run", "--set", "data.test=[{reader: file, path: x}]")[0] == 0
    settled(cli.run.root)
    cli.tree["data"]["test"] = [{"reader": "file", "path": "x"}]
    assert "nothing to do" in cli("run")[1]
    score = cli.run.scores / "result.json"
    whole = score.read_text()
    for damage, what in (
        (lambda: score.write_text(whole.replace("{", "[")), "scores/result.json has changed since it was written"),
        (lambda: score.write_text(whole[:1]), "scores/result.json has 1 of 2 bytes"),
        (score.unlink, "scores/result.json is missing"),
    ):
        damage()
        status, said = cli("run")
        assert status == 2 and said.startswith("score: its results") and what in said and "--redo score" in said, said
        assert what in cli("run", "--dry-run")[1]
        assert "sft needs 'score'" in cli("sft", "--redo", "sft")[1]
    status, said = cli("run", "--redo", "score")
    assert status == 0 and score.read_text() == whole, said
    (cli.run.report / "result.json").unlink()
    assert cli("run")[0] == 0 and (cli.run.report / "result.json").is_file()  # only shows results: made again


def settled(root: Path) -> None:
    """Files that were written long ago, whose digests are remembered."""
    for path in root.rglob("*"):
        os.utime(path, (time.time() - 60, time.time() - 60), follow_symlinks=False)


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


def test_code_that_is_installed_or_of_this_project_goes_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prints = Fingerprints(tmp_path / "none")
    assert list(user_modules("numeric_answer", None, "lorapar_ray.grpo.rewards.functions:tag_count")) == []
    for name in ("pytest", "sys", "no_such", "os.no_such.part", "", ".relative", "a..b", "\0", "__main__"):
        assert prints.of_input(f"module {name}") is None, name
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine.py").write_text("")
    assert prints.of_input("module mine") == hashlib.sha256().hexdigest()


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


def digests(root: Path) -> dict[str, str]:
    known = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in root.rglob("*") if path.is_file()}
    return {str(path.relative_to(root)): found for path, found in known.items() if path.name != "digests.json"}


def test_durations_are_not_part_of_a_result(tmp_path: Path) -> None:
    def left(name: str, seconds: float, system: int) -> str:
        folder = tmp_path / name
        folder.mkdir()
        votes = [[{"teacher": "a", "system": system, "latency_s": seconds}]]
        pq.write_table(pa.table({"id": ["q"], "system": [system], "votes": votes}), folder / "part.parquet")
        told = {
            "rows": system,
            "seconds": seconds,
            "teachers": {"a": {"latency": {"p50": seconds}}},
            "votes_per_second": 1,
        }
        (folder / "summary.json").write_text(json.dumps(told | {"votes_per_second": seconds}))
        return meaning(folder.iterdir(), folder, Fingerprints(tmp_path / "none"))

    assert left("fast", 0.1, 1) == left("slow", 9.5, 1) != left("other", 0.1, 2)


def test_a_report_with_other_settings_leaves_the_runs_own_written_down(cli: Cli) -> None:
    for stage in ("label", "score"):
        assert cli(stage)[0] == 0
    before = (cli.run.root / "config.yaml").read_text()
    for stage in ("report", "label"):
        assert cli(stage, "--set", "sft.learning_rate=9")[0] == 0
    assert (cli.run.root / "config.yaml").read_text() == before


def test_two_configs_or_run_directories_are_one_too_many(cli: Cli, tmp_path: Path) -> None:
    config = write_config(tmp_path / "a.yaml", cli.tree)
    for arguments in (("run", config, "-c", config), ("run", config, config), ("label", "-c", config, "-c", config)):
        status, said = lorapar(*arguments, "-d", cli.run.root)
        assert status == 2 and said.startswith("--config: given 2 times"), said
    assert "--run-dir: given 2 times" in lorapar("label", "-c", config, "-d", "a", "-d", "b")[1]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"identity": {}}', '{"identity": {}, "stages": {"label": 3}}', "\xff"]
)
def test_a_damaged_manifest_is_one_line(text: str, cli: Cli) -> None:
    assert cli("label")[0] == 0
    cli.run.manifest_path.write_bytes(text.encode("latin-1"))
    status, said = cli("label")
    assert status == 2 and "manifest.json' is damaged" in said
    assert cli.run.labels.is_dir()


def test_the_verbose_option_is_everywhere(cli: Cli) -> None:
    for stage in STAGES:
        assert "--verbose" in lorapar(stage, "--help")[1] or "--verb" in lorapar(stage, "--help")[1]


def test_a_second_command_names_the_first(cli: Cli, tmp_path: Path) -> None:
    assert cli("label")[0] == 0
    ready, done = tmp_path / "ready", tmp_path / "done"
    child = os.fork()
    if child == 0:
        with run_lock.run_lock(cli.run.root):
            ready.touch()
            while not done.exists():
                time.sleep(0.01)
        os._exit(0)
    while not ready.exists():
        time.sleep(0.01)
    try:
        status, said = cli("score")
        assert status == 2 and f"in use by process {child} on " in said and "lock.json" in said, said
        assert not cli.run.scores.exists()
    finally:
        done.touch()
        os.waitpid(child, 0)
    assert cli("score")[0] == 0
    assert not (cli.run.root / run_lock.NAME).exists()


def test_the_lock_of_a_dead_process_is_taken_over(cli: Cli) -> None:
    assert cli("label")[0] == 0

    def die() -> None:
        with run_lock.run_lock(cli.run.root):
            os.kill(os.getpid(), signal.SIGKILL)

    in_a_child(die, signal.SIGKILL)
    assert (cli.run.root / run_lock.NAME).is_file()
    assert cli("score")[0] == 0
    assert [path.name for path in cli.run.root.iterdir() if run_lock.NAME in path.name] == []


@pytest.fixture
def quick_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Watch a lock for a moment instead of half a minute."""
    monkeypatch.setattr(run_lock, "SURE_S", 0.2)
    monkeypatch.setattr(run_lock, "RETRY_S", 0.05)


@pytest.mark.parametrize(
    ("holder", "age", "lives"),
    [
        ({}, 0, True),
        ({"pid": 1}, 0, False),  # process 1 started at another time than the holder
        ({"started": 5}, 0, False),  # its pid now belongs to another process
        ({"pid": "no number"}, 0, False),
        ({"host": "elsewhere"}, 10, True),
        ({"host": "elsewhere"}, run_lock.STALE_S + 10, False),
        ({"boot": "before"}, 10, True),
        ({"namespace": "pid:[1]"}, run_lock.STALE_S + 10, False),
    ],
)
def test_a_holder_is_known_by_process_here_and_by_its_beat_elsewhere(
    holder: dict[str, Any], age: float, lives: bool, tmp_path: Path, quick_watch: None
) -> None:
    file = tmp_path / run_lock.NAME
    file.write_text(json.dumps(run_lock.identity() | holder))
    os.utime(file, (time.time() - age, time.time() - age))
    if lives:
        with pytest.raises(UserError, match="in use by process"), run_lock.run_lock(tmp_path):
            pass
    else:
        with run_lock.run_lock(tmp_path), run_lock.run_lock(tmp_path):
            assert json.loads(file.read_text())["pid"] == os.getpid()
        assert not file.exists()


def test_a_clock_ahead_of_the_file_system_s_shows_a_living_holder_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On this machine, where only `lorapar status` looks."""
    file = tmp_path / run_lock.NAME
    file.write_text(json.dumps(run_lock.identity() | {"host": "elsewhere"}))
    fast = {"time": lambda: time.time() + run_lock.STALE_S}
    monkeypatch.setattr(run_lock, "time", SimpleNamespace(**{**vars(time), **fast}))
    found = run_lock.living_holder(tmp_path)
    assert found is not None and found["host"] == "elsewhere"
    os.utime(file, (time.time() - run_lock.STALE_S - 10,) * 2)
    assert run_lock.living_holder(tmp_path) is None and list(tmp_path.iterdir()) == [file]


def test_a_lock_that_a_full_disk_does_not_take_is_not_left_behind(tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: the file is created, and the write fails."""

    def write_nothing() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        with pytest.raises(UserError, match=r"cannot be written to .File too large"), run_lock.run_lock(tmp_path):
            pass
        os.kill(os.getpid(), signal.SIGKILL)

    in_a_child(write_nothing, signal.SIGKILL)
    with run_lock.run_lock(tmp_path):
        assert [each.name for each in tmp_path.iterdir()] == [run_lock.NAME]


@pytest.mark.parametrize("clock", ["of the file system, set forwards", "of the holder, which touches it by its own"])
def test_a_clock_that_is_set_takes_no_lock_from_a_living_holder(clock: str, tmp_path: Path, quick_watch: None) -> None:
    """A holder on another machine: only its beat is known."""
    file, hours = tmp_path / run_lock.NAME, 3 * 3600
    text = json.dumps(run_lock.identity() | {"host": "elsewhere"})
    file.write_text(text)
    late = 0 if "set forwards" in clock else hours
    os.utime(file, (time.time() - hours,) * 2)
    with (
        meanwhile(lambda: os.utime(file, (time.time() - late,) * 2), every_s=0.1),
        pytest.raises(UserError, match="in use by process"),
        run_lock.run_lock(tmp_path, wait_s=0.5),
    ):
        pass
    assert file.read_text() == text


def test_a_clock_that_is_set_back_keeps_no_dead_holder_alive(
    tmp_path: Path, quick_watch: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lock has tomorrow's time, and stays untouched."""
    monkeypatch.setattr(run_lock, "STALE_S", 0.5)
    file = tmp_path / run_lock.NAME
    file.write_text(json.dumps(run_lock.identity() | {"host": "elsewhere"}))
    os.utime(file, (time.time() + 86400,) * 2)
    with pytest.raises(UserError, match="in use by process"), run_lock.run_lock(tmp_path):
        pass
    with run_lock.run_lock(tmp_path, wait_s=5):
        assert json.loads(file.read_text())["pid"] == os.getpid()


def test_of_many_that_find_a_dead_holder_one_gets_the_lock_at_a_time(tmp_path: Path) -> None:
    (tmp_path / run_lock.NAME).write_text(json.dumps(run_lock.identity() | {"started": 5}))
    log = tmp_path / "log"
    children = []
    for _ in range(8):
        child = os.fork()
        if child == 0:
            for _ in range(200):
                try:
                    with run_lock.run_lock(tmp_path):
                        with log.open("a") as lines:
                            lines.write(f"in {os.getpid()}\n")
                        time.sleep(0.002)
                        with log.open("a") as lines:
                            lines.write(f"out {os.getpid()}\n")
                    os._exit(0)
                except UserError:
                    time.sleep(0.005)
            os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 8
    lines = log.read_text().splitlines()
    assert len(lines) == 16
    assert all(a.split()[1] == b.split()[1] for a, b in zip(lines[::2], lines[1::2], strict=True))


@pytest.mark.parametrize("links", [True, False])
def test_a_lock_that_was_taken_meanwhile_is_put_back(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between this process's look at a dead holder's lock and its removal, another process removes it and takes one."""
    file, living = tmp_path / run_lock.NAME, json.dumps(run_lock.identity() | {"token": "of the other"})
    file.write_text(json.dumps(run_lock.identity() | {"started": 5}))

    class Slow(run_lock.Watch):
        def lives(self, holder: dict[str, Any], changed_s: float, age: float) -> bool | None:
            found = super().lives(holder, changed_s, age)
            file.write_text(living)
            return found

    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    run_lock._remove_if_stale(file, Slow())
    assert [each.name for each in tmp_path.iterdir()] == [run_lock.NAME] and file.read_text() == living
    with pytest.raises(UserError, match="in use by process"), run_lock.run_lock(tmp_path):
        pass


@pytest.mark.parametrize(
    ("content", "said"),
    [("[" * 100_000, ""), ('{"pid": 99999999, "started": null}', ""), ("folder", "is a directory"), ("link", "link")],
)
def test_an_invalid_lock_is_taken_or_named(content: str, said: str, tmp_path: Path, quick_watch: None) -> None:
    file = tmp_path / run_lock.NAME
    if content == "folder":
        file.mkdir()
    elif content == "link":
        file.symlink_to("nowhere")
    else:
        own = {key: value for key, value in run_lock.identity().items() if key in ("host", "boot", "namespace")}
        file.write_text(json.dumps(own | json.loads(content)) if content[0] == "{" else content)
        os.utime(file, (1, 1))
    try:
        with run_lock.run_lock(tmp_path):
            assert not said
    except UserError as error:
        assert said and said in str(error).lower()


def test_a_suspended_holder_whose_lock_was_taken_writes_nothing_more(cli: Cli) -> None:
    assert cli("label")[0] == 0
    file, before = cli.run.root / run_lock.NAME, cli.run.manifest_path.read_text()
    with run_lock.run_lock(cli.run.root):
        other = json.dumps({"host": "elsewhere"})
        file.write_text(other)
        with pytest.raises(UserError, match="was taken over by another command"):
            cli.run.record("label", status="started")
        assert cli.run.manifest_path.read_text() == before
    assert file.read_text() == other


def test_leftovers_of_a_killed_new_run_are_not_taken_for_users_files(cli: Cli) -> None:
    (cli.run.root / ".manifest.json.k3ps").mkdir(parents=True)
    for name in (f".{run_lock.NAME}.0", ".probe-1f", ".probe-1f-node"):
        (cli.run.root / name).touch()
    assert cli("label")[0] == 0


def test_an_input_replaced_under_its_old_times_and_size_is_noticed(tmp_path: Path) -> None:
    file, memory = tmp_path / "adapter.safetensors", tmp_path / "work" / "digests.json"
    file.write_text("one")
    first = Fingerprints(memory)
    first._known[str(file)] = [3, file.stat().st_mtime_ns, file.stat().st_ctime_ns, first.of_file(file)]
    first._changed = True
    first.save()
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    time.sleep(0.02)  # the clock of a file system has ticks
    file.write_text("two")
    os.utime(file, ns=times)
    assert Fingerprints(memory).of_file(file) == hashlib.sha256(b"two").hexdigest()


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


@pytest.mark.parametrize("ignored", [True, False])
@pytest.mark.parametrize("waiting", ["time.sleep(60)", "lock.acquire()", "Future().result()"])
def test_a_command_can_be_ended_from_a_thread_whatever_it_waits_for(waiting: str, ignored: bool) -> None:
    """Also one that ignores Ctrl-C, as scripts start their background commands."""
    action = "SIG_IGN" if ignored else "default_int_handler"
    code = f"""
import signal, time
from concurrent.futures import Future
from threading import Lock, Timer
from lorapar_ray.threads import stop_this_command
signal.signal(signal.SIGINT, signal.{action})
Timer(0.5, stop_this_command).start()
lock = Lock()
lock.acquire()
{waiting}
"""
    ended = subprocess.run([sys.executable, "-c", code], timeout=50, check=False, stderr=subprocess.DEVNULL)
    assert ended.returncode == -(signal.SIGTERM if ignored else signal.SIGINT)


def test_a_folder_s_digest_is_that_of_what_is_computed_with(tmp_path: Path) -> None:
    """Of a folder with safetensors it is what it was before other weights counted, so that finished runs stay done."""
    (tmp_path / "config.json").write_text("{}")
    prints = Fingerprints(tmp_path / "none")

    def digests_of_two(name: str) -> set[str | None]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        found = set()
        for content in ("one", "two "):
            (tmp_path / name).write_text(content)
            found.add(prints.of_input(str(tmp_path)))
        (tmp_path / name).unlink()
        return found

    computed_with = ("pytorch_model.bin", "model.pt", "a.gguf", "qwen.tiktoken", "original/consolidated.pth")
    assert [len(digests_of_two(name)) for name in computed_with] == [2] * 5
    assert len(digests_of_two("notes.md")) == 1
    (tmp_path / "model.safetensors").write_text("weights")
    whole = digest(
        [
            [name, hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()]
            for name in ("config.json", "model.safetensors")
        ]
    )
    assert digests_of_two("pytorch_model.bin") == digests_of_two("original/consolidated.pth") == {whole}
    assert len(digests_of_two("qwen.tiktoken") | {whole}) == 3
