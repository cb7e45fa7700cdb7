"""A run directory: where it may be, whose files are in it, and that they are whole."""

from pathlib import Path

import pytest

from lorapar_ray import run_lock
from lorapar_ray.pipeline import STAGES
from lorapar_ray.runs import RunDirectory
from tests.tiny_run import write_config
from tests.unit.faked_run import Cli, everything, settled
from tests.unit.faked_stages import lorapar


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


def test_leftovers_of_a_killed_new_run_are_not_taken_for_users_files(cli: Cli) -> None:
    (cli.run.root / ".manifest.json.k3ps").mkdir(parents=True)
    for name in (f".{run_lock.NAME}.0", ".probe-1f", ".probe-1f-node"):
        (cli.run.root / name).touch()
    assert cli("label")[0] == 0
