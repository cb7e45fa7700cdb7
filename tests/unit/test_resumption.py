"""A killed run resumes with other operation settings; with other result settings it deletes nothing unless asked."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from lorapar_ray.files import write_json
from lorapar_ray.runs import RunDirectory
from tests.tiny_run import tiny_config, write_config
from tests.unit.faked_stages import FAULT, killed, lorapar, use_fakes

NAMES = ("label", "score", "partition", "sft", "grpo", "evaluate", "report")
OPERATION = [
    ("label", "label.timeout_s=7"),
    ("label", "label.retries=9"),
    ("label", "label.rows_per_block=5"),
    ("label", "label.quorum=1"),
    ("label", "label.teachers.0.replicas=2"),
    ("score", "score.workers=3"),
    ("score", "score.batch_size=1"),
    ("score", "score.unit_size=2"),
    ("sft", "sft.micro_batch_size=1"),
    ("sft", "sft.workers=2"),
    ("sft", "sft.packing=true"),
    ("sft", "sft.checkpoint_every=7"),
    ("sft", "sft.report_to=[]"),
    ("grpo", "grpo.rollout_time_limit_s=1800"),
    ("grpo", "grpo.learners=2"),
    ("grpo", "grpo.rollout_actors=3"),
    ("grpo", "grpo.micro_batch_size=1"),
    ("grpo", "grpo.sync=adapter"),
    ("grpo", "grpo.reward_time_limit_s=9"),
    ("grpo", "grpo.rollout_engine.max_num_seqs=4"),
    ("grpo", "grpo.rollout_engine.extra={gpu_memory_utilization: 0.5}"),
    ("grpo", "grpo.learner_resources.threads=2"),
    ("evaluate", "evaluate.engine.kv_cache_gib=2"),
]
RESULT = [
    ("label", "label.calibration=none", "label.calibration batch → none"),
    ("label", "label.definitions.1=at once", "label.definitions.1 "),
    ("label", "label.teachers.1.example_order=system1_first", "label.teachers.1.example_order system2_first → "),
    ("label", "seed=4", "seed 3 → 4"),
    ("score", "adapter.rank=8", "adapter.rank 4 → 8"),
    ("score", "score.criterion=fisher", "score.criterion taylor2 → fisher"),
    ("score", "sft.batch_size=8", "sft.batch_size 4 → 8"),
    ("partition", "partition.theta=0.5", "partition.theta 0.9 → 0.5"),
    ("sft", "sft.learning_rate=1e-5", "sft.learning_rate 0.01 → 1e-5"),
    ("sft", "sft.max_steps=2", "sft.max_steps null → 2"),
    ("grpo", "grpo.learning_rate=1e-5", "grpo.learning_rate 0.02 → 1e-5"),
    ("grpo", "grpo.group_size=8", "grpo.group_size 4 → 8"),
    ("grpo", "grpo.rewards=[{name: exact_answer}]", "grpo.rewards.0.name tests.e2e.rewards:words → exact_answer"),
    ("grpo", "grpo.rollout_engine.extra={quantization: fp8}", "grpo.rollout_engine.extra.quantization null → fp8"),
    ("evaluate", "evaluate.max_new_tokens=9", "evaluate.max_new_tokens 8 → 9"),
]


class Cli:
    """The run of a test."""

    def __init__(self, folder: Path, ready: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        use_fakes(monkeypatch)
        self.ready = ready
        self.monkeypatch = monkeypatch
        self.config = write_config(folder / "config.yaml", tiny_config(Path("no/such/student")))
        self.run = RunDirectory(folder / "run")

    def __call__(self, command: str, *more: str) -> tuple[int, str]:
        return lorapar(command, "-c", self.config, "-d", self.run.root, *more)

    def kill(self, stage: str, command: str, *more: str, how: str = "kill") -> None:
        with self.fault(f"{stage} {how}"):
            killed(command, "-c", self.config, "-d", self.run.root, *more)
        assert self.entry(stage)["status"] == "started"

    def fault(self, what: str) -> Any:
        context = self.monkeypatch.context()

        class Within:
            def __enter__(self) -> None:
                context.__enter__().setenv(FAULT, what)

            def __exit__(self, *_: object) -> None:
                context.__exit__(None, None, None)

        return Within()

    def entry(self, stage: str) -> dict[str, Any]:
        return self.run.entry(stage)

    def before(self, stage: str) -> None:
        """Finish every stage before this one."""
        place = self.ready / stage
        if not place.exists():
            for name in NAMES[: NAMES.index(stage)]:
                assert lorapar(name, "-c", self.config, "-d", place)[0] == 0
        if place.exists():
            shutil.copytree(place, self.run.root)


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs right before a stage, by its name."""
    return tmp_path_factory.mktemp("ready")


@pytest.fixture
def cli(tmp_path: Path, ready: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    return Cli(tmp_path, ready, monkeypatch)


def changed(override: str) -> tuple[str, str]:
    return ("--set", override)


@pytest.mark.parametrize(("stage", "override"), OPERATION)
def test_a_killed_stage_resumes_with_another_operation_setting(stage: str, override: str, cli: Cli) -> None:
    cli.before(stage)
    cli.kill(stage, stage)
    status, said = cli(stage, *changed(override))
    assert status == 0, said
    assert cli.entry(stage)["resumed"] and cli.entry(stage)["status"] == "done"
    assert cli(stage)[1].startswith(f"✓ {stage}: done")


@pytest.mark.parametrize(("stage", "override", "why"), RESULT)
def test_a_killed_stage_keeps_its_checkpoint_with_another_result_setting(
    stage: str, override: str, why: str, cli: Cli
) -> None:
    cli.before(stage)
    cli.kill(stage, stage)
    checkpoints = {path: path.read_text() for path in cli.run.root.rglob("checkpoint")}
    status, said = cli(stage, *changed(override))
    assert status == 2 and why in said and "--redo " in said, said
    assert {path: path.read_text() for path in cli.run.root.rglob("checkpoint")} == checkpoints
    status, said = cli("run", "--dry-run", *changed(override))
    assert status == 0 and why in said and "needs --redo" in said, said
    assert cli(stage)[0] == 0 and cli.entry(stage)["resumed"]  # with the setting restored


def test_a_whole_run_is_refused_before_anything_starts_and_says_what_would_follow(cli: Cli) -> None:
    assert cli("run")[0] == 0
    manifest, settings = cli.run.manifest(), (cli.run.root / "config.yaml").read_text()
    status, said = cli("run", *changed("partition.theta=0.5"))
    assert status == 2 and "partition.theta 0.9 → 0.5" in said and "sft and grpo and evaluate" in said, said
    assert cli.run.manifest() == manifest and (cli.run.root / "config.yaml").read_text() == settings
    status, said = cli("run", "--dry-run", *changed("partition.theta=0.5"))
    assert "replaces partition (3 files, " in said and "this stage needs --redo too" in said, said
    assert cli("run")[1].count("done") >= 7
    status, said = cli("run", "--redo", "partition", *changed("partition.theta=0.5"))
    assert status == 0, said
    assert (cli.run.partition / "result.json").read_text() == '{"theta": 0.5}'
    assert not cli.run.trash.exists()
    assert "theta: 0.5" in (cli.run.root / "config.yaml").read_text()
    assert all(each["status"] == "done" for each in cli.run.manifest()["stages"].values())


def test_a_dry_run_of_a_redo_says_what_may_be_replaced_after_it(cli: Cli) -> None:
    assert cli("run")[0] == 0
    status, said = cli("run", "--redo", "sft", "--dry-run", *changed("sft.epochs=2"))
    assert status == 0 and "needs --redo" not in said, said
    lines = said[said.index("run directory: ") :].splitlines()
    at = next(number for number, line in enumerate(lines) if line.split()[0] == "grpo")
    assert lines[at].split()[1:4] == ["done", "so", "far"], said
    assert lines[at + 1].endswith("this stage is redone") and lines[at + 2].split()[:2] == ["replaces", "grpo"]
    trained = cli.entry("grpo")
    assert cli("run", "--redo", "sft", *changed("sft.epochs=2"))[0] == 0
    assert cli.entry("grpo")["inputs"] != trained["inputs"]


@pytest.mark.parametrize(
    ("other", "differs"),
    [("name=other", "name"), ("model.path=no/other", "model"), ("data.test=[{reader: file, path: x}]", "data")],
)
def test_a_dry_run_refuses_a_directory_of_another_config_as_the_run_does(other: str, differs: str, cli: Cli) -> None:
    assert cli("label")[0] == 0
    for more in ((), ("--redo", "label")):
        for dry in ((), ("--dry-run",)):
            status, said = cli("run", *more, *dry, *changed(other))
            assert status == 2 and f"belongs to another config (its {differs} differs)" in said, said


def test_a_dry_run_says_what_will_be_restored(cli: Cli) -> None:
    assert cli("run")[0] == 0
    other = changed("grpo.learning_rate=1e-5")
    cli.kill("grpo", "grpo", "--redo", "grpo", *other)
    said = cli("run", "--dry-run", *other)[1]
    assert (
        "grpo       will go on " in said
        and "grpo       will go on " in cli("run", "--dry-run", "--redo", "grpo", *other)[1]
    )
    said = cli("run", "--dry-run")[1]
    assert "grpo       will be restored from trash/ " in said and "evaluate   done " in said, said
    assert "needs --redo" not in said and "replaces grpo" not in said, said
    assert "are restored from trash/" in cli("grpo")[1]
    said = cli("run", "--dry-run", *other)[1]  # the redo that was begun, now in trash/
    assert "grpo       will be restored from trash/ and go on " in said and "evaluate   done so far" in said, said
    status, said = cli("grpo", *other)
    assert status == 0 and "are restored from trash/" in said and cli.entry("grpo")["resumed"], said


def test_equal_new_results_redo_no_later_stage(cli: Cli) -> None:
    assert cli("run")[0] == 0
    trained = cli.entry("sft")
    assert cli("run", "--redo", "label")[0] == 0
    assert cli.entry("sft") == trained


def test_a_redo_that_fails_at_once_restores_the_old_results(cli: Cli) -> None:
    assert cli("run")[0] == 0
    before = (cli.entry("label"), (cli.run.labels / "result.json").stat().st_mtime_ns)
    with cli.fault("label fail-at-once"):
        status, said = cli("label", "--redo", "label")
    assert status == 2 and "an input does not open" in said
    assert (cli.entry("label"), (cli.run.labels / "result.json").stat().st_mtime_ns) == before
    assert not cli.run.trash.exists() and cli("label")[1].startswith("✓ label: done")


def test_a_killed_redo_resumes_or_the_old_settings_restore_the_old_results(cli: Cli) -> None:
    assert cli("run")[0] == 0
    old, other = cli.entry("grpo"), changed("grpo.learning_rate=1e-5")
    cli.kill("grpo", "grpo", "--redo", "grpo", *other)
    assert len(list(cli.run.trash.iterdir())) == 1
    status, said = cli("grpo", *other)
    assert status == 0 and cli.entry("grpo")["resumed"] and not cli.run.trash.exists(), said
    cli.kill("grpo", "grpo", "--redo", "grpo")
    assert cli("grpo", "--redo", "grpo")[0] == 0 and cli.entry("grpo")["resumed"]  # the redo that was begun
    cli.kill("grpo", "grpo", "--redo", "grpo", *other)
    status, said = cli("grpo")
    assert status == 0 and "are restored from trash/" in said, said
    assert cli.entry("grpo")["inputs"] == old["inputs"] and cli.entry("grpo")["status"] == "done"
    status, said = cli("grpo", *other)
    assert status == 0 and "are restored from trash/" in said and cli.entry("grpo")["resumed"], said


def test_a_redo_that_is_killed_before_it_writes_anything_has_lost_no_results(cli: Cli) -> None:
    assert cli("run")[0] == 0
    before, entry = (cli.run.grpo / "result.json").stat().st_mtime_ns, cli.entry("grpo")
    cli.kill("grpo", "grpo", "--redo", "grpo", *changed("grpo.learning_rate=1e-5"), how="kill-at-once")
    assert not cli.run.grpo.exists()
    status, said = cli("grpo", *changed("grpo.learning_rate=1e-4"))
    assert status == 2 and "grpo.learning_rate 1e-5 → 0.0001" in said and "--redo grpo" in said, said
    said = cli("run", "--dry-run")[1]
    assert "grpo       will be restored from trash/ " in said, said
    status, said = cli("run")
    assert status == 0 and "grpo: its results for these settings are restored from trash/" in said, said
    assert ((cli.run.grpo / "result.json").stat().st_mtime_ns, cli.entry("grpo")) == (before, entry)
    assert not cli.run.trash.exists()


def killed_after_a_move_of(cli: Cli, what: Path, *arguments: str) -> None:
    """Run a command that is killed right after it has moved `what`, to or from the trash."""
    with cli.monkeypatch.context() as fault:
        rename = Path.rename

        def moved_once(path: Path, target: Path) -> None:
            rename(path, target)
            if cli.run.trash in (*path.parents, *target.parents) and what in (path, target):
                os.kill(os.getpid(), signal.SIGKILL)

        fault.setattr(Path, "rename", moved_once)
        killed(arguments[0], "-c", cli.config, "-d", cli.run.root, *arguments[1:])


def test_results_of_an_earlier_version_are_restored_from_the_trash(cli: Cli) -> None:
    """It recorded fields that no longer exist, and the whole cut as a source."""
    assert cli("run")[0] == 0
    manifest = cli.run.manifest()
    inputs = manifest["stages"]["grpo"]["inputs"]
    inputs["settings"]["grpo.gone"] = 1
    inputs["sources"]["partition"] = manifest["stages"]["partition"]["outputs"]
    write_json(cli.run.manifest_path, manifest)
    cli.kill("grpo", "grpo", "--redo", "grpo", *changed("grpo.learning_rate=1e-5"), how="kill-at-once")
    status, said = cli("grpo")
    assert status == 0 and "are restored from trash/" in said, said
    assert cli.entry("grpo") == manifest["stages"]["grpo"]


def test_a_redo_that_is_killed_while_it_moves_the_old_results_has_lost_none(cli: Cli) -> None:
    assert cli("run")[0] == 0
    before, entry = (cli.run.grpo / "result.json").read_text(), cli.entry("grpo")
    killed_after_a_move_of(cli, cli.run.grpo, "grpo", "--redo", "grpo")
    assert not cli.run.grpo.exists()
    status, said = cli("run")
    assert status == 0 and "grpo: its earlier results are restored from trash/" in said, said
    assert (cli.run.grpo / "result.json").read_text() == before and cli.entry("grpo") == entry
    assert not cli.run.trash.exists()


def test_a_kill_while_a_checkpoint_is_set_aside_leaves_it_to_resume_from(cli: Cli) -> None:
    cli.before("grpo")
    cli.kill("grpo", "grpo")
    cli.run.metrics.mkdir(exist_ok=True)
    (cli.run.metrics / "grpo.jsonl").write_text("{}")
    entry = cli.entry("grpo")
    killed_after_a_move_of(cli, cli.run.metrics / "grpo.jsonl", "grpo", "--redo", "grpo")
    killed_after_a_move_of(cli, cli.run.work / "grpo", "grpo", "--redo", "grpo")
    assert not (cli.run.work / "grpo").exists()
    status, said = cli("grpo")
    assert status == 0 and cli.entry("grpo")["resumed"], said
    assert cli.entry("grpo")["inputs"] == entry["inputs"] and not cli.run.trash.exists()


@pytest.mark.parametrize("other", [[], ["--set", "grpo.learning_rate=1e-5"]])
@pytest.mark.parametrize("moved", ["grpo", "metrics/grpo.jsonl"])
def test_results_whose_restoration_is_killed_are_restored_by_the_next_command(
    other: list[str], moved: str, cli: Cli
) -> None:
    assert cli("run")[0] == 0
    cli.run.metrics.mkdir(exist_ok=True)
    (cli.run.metrics / "grpo.jsonl").write_text("{}")
    files = {path: path.read_text() for path in (cli.run.grpo / "result.json", cli.run.metrics / "grpo.jsonl")}
    entry, first = cli.entry("grpo"), cli.run.root / moved
    cli.kill("grpo", "grpo", "--redo", "grpo", *changed("grpo.learning_rate=1e-5"))
    killed_after_a_move_of(cli, first, "grpo")
    assert first.exists()
    evaluated = cli("evaluate")  # also a command of another stage
    assert evaluated[0] == 0 and "grpo: its earlier results are restored from trash/" in evaluated[1], evaluated
    assert {path: path.read_text() for path in files} == files and cli.entry("grpo") == entry
    status, said = cli("grpo", *other)  # the redo that was begun is still in trash/
    assert status == 0 and cli.entry("grpo").get("resumed", False) == bool(other), said


def test_a_kill_between_the_two_moves_of_a_restoration_loses_neither(cli: Cli) -> None:
    assert cli("run")[0] == 0
    entry, other = cli.entry("grpo"), changed("grpo.learning_rate=1e-5")
    cli.kill("grpo", "grpo", "--redo", "grpo", *other)
    killed_after_a_move_of(cli, cli.run.work / "grpo", "grpo")
    assert not (cli.run.work / "grpo").exists() and not cli.run.grpo.exists()
    assert cli("run", "--dry-run")[0] == 0
    status, said = cli("grpo")
    assert status == 0 and "are restored from trash/" in said and cli.entry("grpo") == entry, said
    status, said = cli("grpo", *other)
    assert status == 0 and cli.entry("grpo")["resumed"], said


SECOND_EPOCH = ("--set", "sft.epochs=2")


@pytest.mark.parametrize("again", [(), ("--redo", "sft")])
@pytest.mark.parametrize(
    ("stage", "how"), [("sft", "kill"), ("sft", "kill-at-once"), ("grpo", "kill"), ("report", "kill-at-once")]
)
def test_a_killed_redo_of_several_stages_goes_on_with_or_without_the_option(
    stage: str, how: str, again: tuple[str, ...], cli: Cli
) -> None:
    assert cli("run")[0] == 0
    old = {name: cli.entry(name) for name in NAMES}
    cli.kill(stage, "run", "--redo", "sft", *SECOND_EPOCH, how=how)
    finished = {name: cli.entry(name) for name in NAMES if cli.entry(name)["status"] == "done"}
    assert cli("run", "--dry-run", *again, *SECOND_EPOCH)[1].count("needs --redo") == 0
    status, said = cli("run", *again, *SECOND_EPOCH, "--set", "grpo.learners=2")  # its resources may differ
    assert status == 0 and "the redo of sft that was interrupted goes on" in said, said
    assert (cli.run.sft / "result.json").read_text() == '{"epochs": 2.0}'
    done = NAMES[: NAMES.index(stage)]
    assert all(cli.entry(name) == finished[name] for name in done)  # none of them twice
    assert cli.entry(stage)["resumed"] == (how == "kill")
    assert all(cli.entry(name) != old[name] for name in ("sft", "grpo", "evaluate"))
    assert "redo" not in cli.run.manifest() and not cli.run.trash.exists()
    assert cli("run", *SECOND_EPOCH)[1].count("done") >= 7
    trained = cli.entry("sft")
    assert cli("run", "--redo", "sft", *SECOND_EPOCH)[0] == 0 and cli.entry("sft") != trained  # another redo


def test_a_killed_redo_goes_on_stage_by_stage(cli: Cli) -> None:
    assert cli("run")[0] == 0
    cli.kill("sft", "run", "--redo", "sft", *SECOND_EPOCH)
    assert "redo" in cli.run.manifest()
    for name in ("sft", "grpo", "evaluate"):
        status, said = cli(name, *SECOND_EPOCH)
        assert status == 0, said
    assert "redo" not in cli.run.manifest()


def test_a_killed_redo_permits_no_more_than_its_command_did(cli: Cli) -> None:
    assert cli("run")[0] == 0
    cli.kill("sft", "sft", "--redo", "sft", *SECOND_EPOCH)
    assert cli("sft", *SECOND_EPOCH)[0] == 0 and "redo" not in cli.run.manifest()
    status, said = cli("grpo", *SECOND_EPOCH)
    assert status == 2 and "sft has other results" in said, said
    cli.kill("grpo", "run", "--redo", "grpo", *SECOND_EPOCH)
    status, said = cli("run", *SECOND_EPOCH, *changed("partition.theta=0.5"))
    assert status == 2 and "partition.theta 0.9 → 0.5" in said, said
    status, said = cli("run", *SECOND_EPOCH, *changed("grpo.group_size=8"))
    assert status == 2 and "grpo.group_size 4 → 8" in said, said
    assert cli("run", *SECOND_EPOCH)[0] == 0


def test_a_killed_redo_of_other_settings_waits_while_the_old_ones_are_restored(cli: Cli) -> None:
    assert cli("run")[0] == 0
    old = {name: cli.entry(name) for name in NAMES}
    cli.kill("sft", "run", "--redo", "sft", *SECOND_EPOCH)
    status, said = cli("run")
    assert status == 0 and "sft: its results for these settings are restored from trash/" in said, said
    assert {name: cli.entry(name) for name in NAMES[:-1]} == {name: old[name] for name in NAMES[:-1]}
    for again in ((), ("--redo", "sft")):
        said = cli("run", "--dry-run", *again, *SECOND_EPOCH)[1]
        assert "sft        will be restored from trash/ and go on" in said and "this stage is redone" in said, said
    status, said = cli("run", "--redo", "sft", *SECOND_EPOCH)
    assert status == 0 and cli.entry("sft")["resumed"], said
    assert "redo" not in cli.run.manifest()


def test_a_killed_first_attempt_of_a_stage_to_redo_is_not_begun_again(cli: Cli) -> None:
    cli.before("sft")
    cli.kill("sft", "run", "--redo", "sft")
    cli.kill("sft", "run", "--redo", "sft")
    assert cli("run", "--redo", "sft")[0] == 0 and cli.entry("sft")["resumed"]


def test_a_redo_that_fails_before_it_replaces_anything_is_forgotten(cli: Cli) -> None:
    assert cli("run")[0] == 0
    old = cli.entry("sft")
    with cli.fault("sft fail-at-once"):
        assert cli("run", "--redo", "sft", *SECOND_EPOCH)[0] == 2
    assert cli.entry("sft") == old and "redo" not in cli.run.manifest()
    with cli.fault("grpo fail-at-once"):
        assert cli("run", "--redo", "sft", "--redo", "grpo")[0] == 2  # sft has been redone
    trained = cli.entry("sft")
    assert trained != old and "redo" in cli.run.manifest()
    with cli.fault("grpo fail-at-once"):
        assert cli("run")[0] == 2
    assert cli("run", "--redo", "sft", "--redo", "grpo")[0] == 0
    assert cli.entry("sft") == trained and "redo" not in cli.run.manifest()


def test_a_redo_may_be_extended_and_a_redo_under_other_settings_replaces_it(cli: Cli) -> None:
    assert cli("run")[0] == 0
    cli.kill("sft", "run", "--redo", "sft")
    cli.kill("evaluate", "run", "--redo", "sft", "--redo", "evaluate")
    assert cli.run.manifest()["redo"]["stages"] == ["sft", "evaluate"]
    trained = cli.entry("sft")
    assert trained["resumed"]
    assert cli("run", "--redo", "sft", *SECOND_EPOCH)[0] == 0
    assert cli.entry("sft") != trained and "redo" not in cli.run.manifest()


def test_a_damaged_redo_in_the_manifest_is_one_clear_line(cli: Cli) -> None:
    assert cli("label")[0] == 0
    whole = cli.run.manifest()
    for redo in ("sft", {}, {"id": "x", "settings": "y", "stages": "sft", "allowed": []}, {"id": 1}):
        write_json(cli.run.manifest_path, {**whole, "redo": redo})
        status, said = cli("label")
        assert status == 2 and "is damaged" in said, said


def test_a_stage_that_has_written_nothing_runs_under_any_settings(cli: Cli) -> None:
    cli.before("sft")
    with cli.fault("sft fail-at-once"):
        assert cli("sft")[0] == 2
    assert cli("sft", *changed("sft.learning_rate=1e-5"))[0] == 0


def test_a_stage_is_not_trained_on_results_of_other_settings(cli: Cli) -> None:
    cli.before("sft")
    status, said = cli("sft", *changed("partition.theta=0.5"))
    assert status == 2 and said.startswith("sft needs 'partition'. partition: has results of other inputs"), said
    assert not cli.run.sft.exists()


def test_a_redo_of_no_stage_of_the_command_is_refused(cli: Cli) -> None:
    assert "--redo grp: not among this run's stages" in cli("run", "--redo", "grp")[1]
    assert "--redo grpo: this command runs sft" in cli("sft", "--redo", "grpo")[1]
