"""`gpus: auto` on clusters of several sizes, with and without numbers in the config."""

from typing import Any

import pytest
from typer.testing import CliRunner

from lorapar_ray.cli import app
from lorapar_ray.config import Config
from lorapar_ray.errors import UserError
from lorapar_ray.gpus import place, sync_of
from lorapar_ray.grpo.placement import empty_places, without_a_bundle
from lorapar_ray.labeling.serving import applications
from lorapar_ray.pipeline import PIPELINE
from lorapar_ray.workers import hidden_gpus

TEACHERS = [{"name": name, "model": "m"} for name in ("a", "b", "c")]


def shared(**changed: Any) -> dict[str, Any]:
    """Labelling with a teacher that answers with another one's engine."""
    return {"teachers": [TEACHERS[0], {**TEACHERS[1], "engine_of": "a", **changed}, TEACHERS[2]]}


def config(**sections: Any) -> Config:
    source = {"reader": "file", "path": "rows.jsonl"}
    label = {"teachers": TEACHERS, **sections.pop("label", {})}
    tree = {"name": "x", "model": {"path": "m"}, "data": {"train": [source]}, "label": label}
    return Config.model_validate({**tree, **sections})


@pytest.mark.parametrize(("gpus", "share"), [(0, 0), (1, 0.33), (2, 0.5), (3, 1), (8, 1)])
def test_teachers_share_what_there_is(gpus: int, share: float) -> None:
    label = place(config(), "label", gpus).label
    assert [teacher.resources.gpus for teacher in label.teachers] == [share] * 3
    assert label.resources.gpus == 0


def test_a_teacher_with_the_engine_of_another_takes_nothing() -> None:
    placed = place(config(label=shared(replicas=5)), "label", 2)
    assert [teacher.resources.gpus for teacher in placed.label.teachers] == [1, 0, 1]
    assert set(PIPELINE["label"].groups(placed)) == {"a", "c", "workers"}
    assert applications(placed) == {"a": "lorapar-x-a", "c": "lorapar-x-c"}
    judges = config(label=shared(), grpo={"rewards": [{"name": "judge"}], "judge": {"teachers": ["b"]}}).judges
    assert [(judge.name, judge.has_engine) for judge in judges] == [("b", True)]


def test_a_teacher_over_several_gpus_takes_them_first() -> None:
    wide = {**TEACHERS[0], "engine": {"tensor_parallel": 2}}
    label = place(config(label={"teachers": [wide, *TEACHERS[1:]]}), "label", 3).label
    assert [teacher.resources.gpus for teacher in label.teachers] == [2, 0.5, 0.5]


def test_too_large_numbers_are_left_to_the_check_of_the_cluster() -> None:
    fixed = [{**teacher, "resources": {"gpus": 1}} for teacher in TEACHERS]
    label = place(config(label={"teachers": fixed}), "label", 1).label
    assert [teacher.resources.gpus for teacher in label.teachers] == [1, 1, 1]


def test_numbers_are_kept_and_taken_off() -> None:
    fixed = [{**TEACHERS[0], "resources": {"gpus": 1}}, TEACHERS[1], {**TEACHERS[2], "resources": {"gpus": 0}}]
    label = place(config(label={"teachers": fixed}), "label", 2).label
    assert [teacher.resources.gpus for teacher in label.teachers] == [1, 1, 0]


@pytest.mark.parametrize(("gpus", "workers", "each"), [(0, 4, 0), (1, 1, 1), (3, 3, 1), (8, 4, 1)])
def test_a_training_group_has_a_gpu_for_each_worker(gpus: int, workers: int, each: float) -> None:
    tree = config(score={"workers": 4}, sft={"workers": 4})
    score = place(tree, "score", gpus)
    assert (score.score.workers, score.score.resources.gpus) == (workers, each)
    sft = place(tree, "sft", gpus).sft
    assert (sft.workers, sft.resources.gpus) == (workers, each)


def test_a_number_fixes_the_workers_too() -> None:
    sft = place(config(sft={"workers": 4, "resources": {"gpus": 0.6}}), "sft", 2).sft
    assert (sft.workers, sft.resources.gpus) == (4, 0.6)  # the cluster's check refuses it
    assert config(sft={"resources": {"gpus": 0.5}}).sft.workers == 1


@pytest.mark.parametrize(
    ("tree", "field"),
    [
        ({"sft": {"workers": 2, "resources": {"gpus": 0.5}}}, "sft.resources"),
        ({"sft": {"workers": [1, 4], "resources": {"gpus": 0.3}}}, "sft.resources"),
        ({"score": {"workers": 2, "resources": {"gpus": 0.25}}}, "score.resources"),
        (
            {"grpo": {"learners": 2, "learner_resources": {"gpus": 0.5}, "rollout_resources": {"gpus": 1}}},
            "grpo.learner_resources",
        ),
        (
            {"grpo": {"learners": 2, "learner_resources": {"gpus": 0.5}, "rollout_resources": {"gpus": 0}}},
            "grpo.learner_resources",
        ),
    ],
)
def test_numbers_by_which_two_ranks_may_meet_on_one_gpu_are_refused(tree: dict[str, Any], field: str) -> None:
    """NCCL refuses a group with two ranks on one GPU."""
    with pytest.raises(ValueError) as error:
        config(**tree)
    told = error.value.errors()[0]  # type: ignore[attr-defined]
    assert [*told["loc"], field.rpartition(".")[2]] == field.split(".")
    assert (
        f"{field.rpartition('.')[2]}.gpus: with 0." in told["msg"] and "on one GPU, which NCCL refuses" in told["msg"]
    )


def test_learners_that_may_meet_beside_engines_that_auto_places_are_refused() -> None:
    halves = config(grpo={"learners": 2, "learner_resources": {"gpus": 0.5}})
    with pytest.raises(UserError, match=r"^grpo\.learner_resources\.gpus: with 0\.5 two of 2 learners may meet"):
        place(halves, "grpo", 2)
    assert place(halves, "grpo", 0).grpo.learner_resources.gpus == 0.5  # the cluster's check says that it has none
    smaller = place(config(grpo={"learners": 2, "learner_resources": {"gpus": 0.4}}), "grpo", 2).grpo
    assert smaller.rollout_resources.gpus == 0.6  # no whole GPU, which would leave one for both learners


@pytest.mark.parametrize(
    ("gpus", "asked", "engines", "learners", "sync"),
    [
        (0, {}, (1, 0), (1, 0), "merged"),
        (1, {}, (1, 0.6), (1, 0.4), "adapter"),
        (2, {}, (1, 1), (1, 1), "adapter"),
        (2, {"rollout_actors": 2, "learners": 2}, (2, 0.6), (2, 0.4), "adapter"),
        (2, {"rollout_actors": 4, "learners": 2}, (2, 0.6), (2, 0.4), "adapter"),
        (4, {"rollout_actors": 3, "learners": 2}, (3, 0.6), (2, 0.4), "adapter"),
        (3, {"rollout_engine": {"tensor_parallel": 2}}, (1, 2), (1, 1), "adapter"),
        (1, {"rollout_resources": {"gpus": 0.7}}, (1, 0.7), (1, 0.3), "adapter"),
        (1, {"rollout_resources": {"gpus": 0}, "sync": "adapter"}, (1, 0), (1, 1), "adapter"),
        (1, {"learner_resources": {"gpus": 0}}, (1, 1), (1, 0), "adapter"),
        (1, {"sync": "merged"}, (1, 0.6), (1, 0.4), "merged"),
        (3, {"learners": 4, "sequence_parallel": 2}, (1, 0.6), (2, 0.4), "adapter"),
        (1, {"learners": 2, "sequence_parallel": 2}, (1, 0.6), (2, 0.4), "adapter"),  # the cluster's check refuses it
    ],
)
def test_engines_and_learners_have_separate_gpus_or_share_each(
    gpus: int,
    asked: dict[str, Any],
    engines: tuple[int, float],
    learners: tuple[int, float],
    sync: str,
) -> None:
    grpo = place(config(grpo=asked), "grpo", gpus).grpo
    assert (grpo.rollout_actors, grpo.rollout_resources.gpus) == engines
    assert (grpo.learners, grpo.learner_resources.gpus) == learners
    assert sync_of(grpo) == sync


@pytest.mark.parametrize(
    ("gpus", "asked", "most"),
    [
        (0, {}, 4),
        (2, {}, 4),  # one for the engine and one for the fewest learners; more may join
        (1, {}, None),  # the learner has a part of the engine's
        (1, {"learner_resources": {"gpus": 0}}, 4),
        (1, {"learner_resources": {"gpus": 1}}, 4),  # the cluster's check refuses it
    ],
)
def test_learners_that_share_gpus_are_no_range(gpus: int, asked: dict[str, Any], most: int | None) -> None:
    assert place(config(grpo={"max_learners": 4, **asked}), "grpo", gpus).grpo.max_learners == most


def test_processes_without_a_bundle_count_in_the_room_of_stage_2() -> None:
    rewards, environments = {"cpus": 0.5, "gpus": 0}, {"cpus": 2, "gpus": 0}
    grpo = {"reward_workers": 3, "reward_resources": rewards, "environment_resources": environments}
    judged = {"rewards": [{"name": "judge"}], "judge": {"teachers": ["a"]}}
    plain, whole = (config(grpo={**grpo, **more}) for more in ({}, {**judged, "environment": "a:b"}))
    assert [(count, each.cpus) for count, each in without_a_bundle(plain)] == [(3, 0.5)]
    assert [(count, each.cpus) for count, each in without_a_bundle(whole)] == [(3, 0.5), (1, 2), (1, 1)]


def test_dry_run_shows_a_range() -> None:
    said = PIPELINE["grpo"].resources(config(grpo={"learners": 2, "max_learners": 8}))
    assert "2 to 8 × learner (1 CPU + GPU auto)" in said
    said = PIPELINE["evaluate"].resources(config(evaluate={"engines": [1, 4]}))
    assert said.startswith("1 to 4 × engine (1 CPU + GPU auto)")


@pytest.mark.parametrize(
    ("gpus", "asked", "empty"),
    [
        (1, {}, 0),
        (2, {"rollout_actors": 2, "learners": 2}, 0),
        (4, {"rollout_actors": 3, "learners": 2}, 1),  # two learners would fit on the fourth
        (8, {"rollout_actors": 3, "learners": 2}, 0),  # apart: whole GPUs
    ],
)
def test_no_two_learners_fit_a_gpu_without_an_engine(gpus: int, asked: dict[str, Any], empty: int) -> None:
    assert empty_places(place(config(grpo=asked), "grpo", gpus), gpus) == empty


def test_a_gpu_of_which_judges_have_a_part_has_its_place_too() -> None:
    judged = {"rewards": [{"name": "judge"}], "judge": {"teachers": ["a"]}, "rollout_actors": 2, "learners": 4}
    placed = place(config(grpo=judged), "grpo", 4)
    assert placed.judges[0].resources.gpus == 0.2
    assert empty_places(placed, 3.8) == 2
    assert empty_places(placed, 2.8) == 1  # another job has one


def test_judges_take_a_part_of_each_gpu() -> None:
    tree = config(grpo={"rewards": [{"name": "judge"}], "rollout_actors": 2, "learners": 2})
    placed = place(tree, "grpo", 2)
    engine, learner = placed.grpo.rollout_resources.gpus, placed.grpo.learner_resources.gpus
    judges = [judge.resources.gpu_count for judge in placed.judges]
    assert judges == [0.06] * 3
    assert isinstance(engine, float) and isinstance(learner, float)
    assert engine > 0.5  # neither two engines nor an engine and two learners fit on one GPU
    assert (1 - engine) / 2 < learner and engine + learner + sum(judges) <= 1  # Ray may put all judges on one
    apart = place(tree, "grpo", 7)
    assert [judge.resources.gpu_count for judge in apart.judges] == [1] * 3
    assert (apart.grpo.rollout_resources.gpus, apart.grpo.learner_resources.gpus) == (1, 1)


def test_judges_with_large_parts_or_several_gpus_take_them_first() -> None:
    judged = {"rewards": [{"name": "judge"}], "judge": {"teachers": ["a"]}, "rollout_actors": 2, "learners": 2}

    def with_judge(**judge: Any) -> Config:
        return config(label={"teachers": [{**TEACHERS[0], **judge}]}, grpo=judged)

    with pytest.raises(UserError, match=r"two of 2 learners may meet.*an engine has 0\.51, judges up to 0\.3 of a GPU"):
        place(with_judge(resources={"gpus": 0.3}), "grpo", 2)
    wide = place(with_judge(engine={"tensor_parallel": 2}), "grpo", 4)
    assert wide.judges[0].resources.gpus == 2
    assert (wide.grpo.rollout_actors, wide.grpo.rollout_resources.gpus) == (2, 0.6)
    assert (wide.grpo.learners, wide.grpo.learner_resources.gpus) == (2, 0.4)


def test_evaluation_takes_a_gpu_for_each_rank() -> None:
    tree = config(evaluate={"engine": {"tensor_parallel": 2}})
    assert place(tree, "evaluate", 2).evaluate.resources.gpus == 2
    assert place(tree, "evaluate", 0).evaluate.resources.gpus == 0


@pytest.mark.parametrize(
    ("gpus", "ranks", "asked", "engines"),
    [
        (0, 1, {}, 3),
        (1, 1, {}, 1),
        (2, 1, {}, 2),
        (8, 1, {}, 3),
        (5, 2, {}, 2),
        (1, 2, {}, 1),
        (1, 1, {"gpus": 0.3}, 3),
    ],
)
def test_evaluation_has_at_most_as_many_engines_as_fit(
    gpus: int, ranks: int, asked: dict[str, Any], engines: int
) -> None:
    """The cluster's check would refuse others, after the training."""
    tree = {"engines": 3, "engine": {"tensor_parallel": ranks}, **({"resources": asked} if asked else {})}
    assert place(config(evaluate=tree), "evaluate", gpus).evaluate.engines == engines


def test_a_process_without_gpus_sees_none() -> None:
    resources = place(config(sft={"resources": {"gpus": 0}}), "sft", 8).sft.resources
    assert hidden_gpus(resources) == {"CUDA_VISIBLE_DEVICES": ""}
    assert hidden_gpus(place(config(), "sft", 8).sft.resources) == {}


def test_the_rule_is_shown_before_anything_runs(tmp_path: Any) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(config().to_yaml())
    shown = CliRunner().invoke(app, ["run", str(file), "--dry-run", "--run-dir", str(tmp_path / "run")])
    assert "GPU auto: one for each teacher, or shared evenly" in shown.output.replace("\n", " ")
