"""The config: every field is marked as result or operation; invalid configs are refused with one line when read."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from lorapar_ray.config import Config, EngineConfig, Operation, Result, Section, deciding
from lorapar_ray.config.marks import known_setting, mark_of
from lorapar_ray.config_file import load_config
from lorapar_ray.errors import UserError
from tests.tiny_run import tiny_config, write_config

CONFIGS = Path(__file__).parents[2] / "jobs" / "configs"


def sections(root: type[Section] = Section) -> list[type[Section]]:
    return [found for each in root.__subclasses__() for found in (each, *sections(each))]


def test_every_field_says_whether_it_decides_a_result() -> None:
    ours = [each for each in sections() if each.__module__.startswith("lorapar_ray.")]
    assert len(ours) > 15
    for section in ours:
        for field in section.model_fields:
            mark_of(section, field)


def test_an_unmarked_field_is_found() -> None:
    class Careless(Section):
        marked: Result[int] = 1
        unmarked: int = 1
        both: Operation[Result[int]] = 1

    assert mark_of(Careless, "marked").decides
    for field in ("unmarked", "both"):
        with pytest.raises(TypeError, match=rf"Careless\.{field}: write it as Result"):
            mark_of(Careless, field)


def test_what_decides_is_taken_out_of_nested_sections_and_lists() -> None:
    config = load_config(CONFIGS / "quickstart.yaml")
    found = deciding(config)
    assert "name" not in found and found["seed"].value == config.seed
    assert found["label.teachers.0.engine.max_model_len"].value == 512
    assert found["grpo.rewards.0.name"].value == config.grpo.rewards[0].name
    for how in ("label.teachers.0.replicas", "label.resources.cpus", "score.workers", "grpo.judge.time_limit_s"):
        assert how not in found
    assert "grpo.rollout_engine.dtype" in found
    assert "grpo.rollout_engine.max_model_len" not in found  # a sample must fit, else the config is refused
    extra = {"gpu_memory_utilization": 0.5, "quantization": "fp8"}
    assert deciding(EngineConfig(extra=extra))["extra"] == ({"quantization": "fp8"}, False)
    assert deciding(EngineConfig(extra={"load_format": "safetensors"}))["extra"].value == {}
    assert deciding(EngineConfig(extra={"load_format": "dummy"}))["extra"].value == {"load_format": "dummy"}
    assert deciding(EngineConfig())["max_model_len"] == (1024, True)
    assert all(known_setting(Config, path) for path in found)
    assert not known_setting(Config, "grpo.learning_rat") and not known_setting(Config, "data.train.0.old")


def tree(**changes: Any) -> dict[str, Any]:
    plain = {**tiny_config(Path("student")), "label": {"strategy": "random"}}
    for name, value in changes.items():
        plain[name] = {**plain[name], **value} if isinstance(value, dict) and name in plain else value
    return plain


TEACHER = {"name": "t", "model": "m/m"}


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"sft": {"betas": [2, 5]}}, "sft.betas.0"),
        ({"sft": {"betas": [0.9]}}, "sft.betas.1"),
        ({"sft": {"learning_rate": float("inf")}}, "sft.learning_rate"),
        ({"sft": {"epochs": float("nan")}}, "sft.epochs"),
        ({"sft": {"systems": [3]}}, "sft.systems: System 3"),
        ({"sft": {"systems": []}}, "sft.systems"),
        ({"sft": {"systems": [1, 1]}}, "sft.systems"),
        ({"sft": {"batch_size": 10**30}}, "sft.batch_size"),
        ({"grpo": {"systems": [3]}}, "grpo.systems: System 3"),
        ({"grpo": {"systems": [0]}}, "grpo.systems.0"),
        ({"grpo": {"rewards": [{"name": "length", "weight": float("nan")}]}}, "grpo.rewards.0.weight"),
        ({"grpo": {"rewards": [{"name": "length", "weight": 0}]}}, "every weight is 0"),
        ({"grpo": {"sequence_ratio_bounds": [2.0, 0.5]}}, "sequence_ratio_bounds: [2, 0.5] is empty"),
        ({"grpo": {"sequence_ratio_bounds": [1.0, 1.0]}}, "sequence_ratio_bounds"),
        ({"grpo": {"temperature": 0.0}}, "grpo.temperature"),
        ({"grpo": {"temperature": 0.009}}, "0.009 is below 0.01: vLLM would sample at 0.01"),
        ({"grpo": {"betas": [0.9, 1.0]}}, "grpo.betas.1"),
        ({"grpo": {"overlong_cache": 9}}, "overlong_cache: 9 is more than max_completion_length"),
        ({"grpo": {"stop": [""]}}, "grpo.stop.0"),
        ({"grpo": {"importance_cap": float("inf")}}, "grpo.importance_cap"),
        ({"grpo": {"rollout_engine": {"extra": {"swap_space": float("inf")}}}}, "grpo.rollout_engine.extra.swap_space"),
        ({"adapter": {"targets": []}}, "adapter.targets"),
        ({"adapter": {"alpha": float("-inf")}}, "adapter.alpha"),
        ({"evaluate": {"models": ["base", "base"]}}, "evaluate.models"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**32}, "seed"),
        ({"name": ".."}, "name"),
        ({"name": ".hidden"}, "name"),
        ({"name": "a/b"}, "name"),
        ({"name": "x" * 300}, "name"),
        ({"model": {"path": "a\0b"}}, "model.path"),
        ({"model": {"path": "a\ud800"}}, "model.path"),
        ({"label": {"teachers": [{**TEACHER, "requests_per_second": float("inf")}]}}, "requests_per_second"),
        (
            {"label": {"teachers": [TEACHER, {**TEACHER, "name": "b", "engine_of": "c"}]}},
            "no teacher 'c' with an engine",
        ),
        (
            {"label": {"teachers": [{**TEACHER, "engine_of": TEACHER["name"]}]}},
            "with an engine of its own; known: none",
        ),
        (
            {"label": {"teachers": [TEACHER, {**TEACHER, "name": "b", "engine_of": TEACHER["name"], "model": "n"}]}},
            "has another model; make them equal",
        ),
        ({"label": {"strategy": "vote", "teachers": [{**TEACHER, "replicas": 3, "max_replicas": 2}]}}, "max_replicas"),
        ({"sft": {"workers": 3, "max_workers": 2}}, "max_workers"),
        ({"score": {"workers": 3, "max_workers": 2}}, "max_workers"),
        ({"grpo": {"rollout_actors": 3, "max_rollout_actors": 2}}, "max_rollout_actors"),
        ({"grpo": {"learners": 3, "sequence_parallel": 2}}, "3 learners cannot be divided into groups of 2"),
        ({"sft": {"max_workers": 2, "sharding": "hsdp"}}, "workers: hsdp needs as many workers on each node"),
        ({"grpo": {"learners": 3, "max_learners": 2}}, "max_learners: 2 is below learners (3)"),
        ({"grpo": {"learners": [1, 2], "sharding": "hsdp"}}, "learners: hsdp needs as many learners on each node"),
        (
            {"grpo": {"learners": 2, "max_learners": 5, "sequence_parallel": 2}},
            "5 learners cannot be divided into groups of 2",
        ),
        ({"grpo": {"learners": [1, 2], "learner_resources": {"gpus": 0.4}}}, "learners: those of a range share no GPU"),
    ],
)
def test_impossible_configs_are_refused(changes: dict[str, Any], culprit: str) -> None:
    with pytest.raises(ValidationError) as error:
        Config.model_validate(tree(**changes))
    where = [".".join(map(str, each["loc"])) + " " + each["msg"] for each in error.value.errors()]
    assert any(culprit in each for each in where), where


def loaded(folder: Path, text: str, *overrides: str) -> Config:
    path = folder / "config.yaml"
    path.write_text("name: t\nmodel: {path: a/b}\ndata: {train: [{reader: file, path: x}]}\n" + text)
    return load_config(path, overrides)


def test_an_override_changes_one_of_two_places_that_share_an_anchor(tmp_path: Path) -> None:
    text = "grpo: {rollout_engine: &e {max_num_seqs: 3}}\nevaluate: {engine: *e}\n"
    config = loaded(tmp_path, text, "evaluate.engine.max_num_seqs=7")
    assert (config.grpo.rollout_engine.max_num_seqs, config.evaluate.engine.max_num_seqs) == (3, 7)
    merged = "sft: &s {resources: {cpus: 2}}\nscore: {workers: 2, <<: {resources: {cpus: 3}}}\n"
    assert loaded(tmp_path, merged).score.resources.cpus == 3


def test_an_override_within_defaults_keeps_the_others(tmp_path: Path) -> None:
    config = loaded(tmp_path, "", "label.definitions.1=at once", "grpo.rewards.0.weight=2", "sft.betas.0=0.5")
    assert config.label.definitions[1] == "at once" and "several steps" in config.label.definitions[2]
    assert [(each.name, each.weight) for each in config.grpo.rewards] == [("numeric_answer", 2.0)]
    assert config.sft.betas == (0.5, 0.999)
    assert loaded(tmp_path, "", "label.resources.threads=3").label.resources.cpus == 0.5
    given = loaded(tmp_path, "label: {definitions: {1: a, 2: b}, strategy: random}\n", "label.definitions.2=c")
    assert given.label.definitions == {1: "a", 2: "c"}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("sft: {epochs: 3}\nsft: {max_length: 9}\n", "'sft' is given twice, in lines 4 and 5"),
        ("sft: {epochs: 3, epochs: 4}\n", "'sft.epochs' is given twice"),
        ("label: {strategy: random, definitions: {1: a, '1': b, 2: c}}\n", "'label.definitions.1' is given twice"),
        ("label: {definitions: {1: a, '01': b, 2: c}}\n", "'label.definitions.1' is given twice"),
        ("label: {definitions: {1: a, 0x1: b, 2: c}}\n", "'label.definitions.1' is given twice"),
        ("grpo: {judge: {yes: 1, true: 2}}\n", "'grpo.judge.True' is given twice"),
        ("sft: &a {b: *a}\n", "not valid YAML"),
        ("sft: {epochs: 2024-13-45}\n", "not valid YAML"),
        ("sft: " + "[" * 1500 + "\n", "not valid YAML"),
        (f"seed: {'9' * 5000}\n", "not valid YAML"),
        ("a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
            f"{new}: &{new} [{','.join(['*' + old] * 9)}]\n" for old, new in zip("abcdefg", "bcdefgh", strict=True)
        ), "anchors stand for more than"),
        ("3: x\n", "field"),
    ],
)  # fmt: skip
def test_contradictory_or_empty_yaml_is_one_line(text: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        loaded(tmp_path, text)
    assert problem in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize(
    "override", ["sft", "=3", "sft.epochs.x.y=1", "data.train.7.path=x", "sft.epochs={a: 1, a: 2}"]
)
def test_an_override_that_fits_nowhere_is_one_line(override: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--set"):
        loaded(tmp_path, "sft: {epochs: 1}\n", override)
    with pytest.raises(UserError, match=r"--set 'seed': given twice"):
        loaded(tmp_path, "", "seed=1", "seed=2")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["sft.epochs=2", "sft={}"], r"--set 'sft': would drop --set 'sft.epochs'; give it first"),
        (["label.definitions.1=a", "label.definitions.01=b"], r"--set 'label.definitions.01': the config has no"),
        (["data.train.00.path=x"], r"--set 'data.train.00.path': the config has no such place"),
        (["data.train.-1.path=x"], r"--set 'data.train.-1.path': the config has no such place"),
    ],
)
def test_no_override_silently_drops_or_repeats_another(overrides: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        loaded(tmp_path, "", *overrides)


def test_a_file_in_another_encoding_is_one_line_and_a_byte_order_mark_is_none(tmp_path: Path) -> None:
    path = write_config(tmp_path / "c.yaml", tree())
    path.write_bytes("\ufeff".encode() + path.read_bytes())
    assert load_config(path).name == "tiny"
    path.write_bytes("name: caf\xe9\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"c\.yaml': not UTF-8 at byte 9"):
        load_config(path)


def test_a_message_repeats_no_value_that_may_hold_a_key(tmp_path: Path) -> None:
    teacher = "{name: t, model: m, base_url: [https://user:s3cret@host], extra_body: {key: s3cret}, kind: remote}"
    with pytest.raises(UserError) as error:
        loaded(tmp_path, f"label: {{strategy: vote, teachers: [{teacher}]}}\n")
    assert "base_url" in str(error.value) and "s3cret" not in str(error.value)


RANGES = {
    "label.teachers.0.replicas": "label.teachers.0.max_replicas",
    "score.workers": "score.max_workers",
    "sft.workers": "sft.max_workers",
    "grpo.learners": "grpo.max_learners",
    "grpo.rollout_actors": "grpo.max_rollout_actors",
    "evaluate.engines": "evaluate.max_engines",
}
"""By each field that may be a range, the field in which a resolved config has the most."""
TAUGHT = "label: {strategy: vote, teachers: [{name: t, model: o/n}]}\n"


def at(config: Config, path: str) -> Any:
    value: Any = config.model_dump(mode="json")
    for part in path.split("."):
        value = value[int(part) if part.isdecimal() else part]
    return value


@pytest.mark.parametrize("field", RANGES)
def test_a_range_is_a_list_of_the_fewest_and_the_most(field: str, tmp_path: Path) -> None:
    most = RANGES[field]
    config = loaded(tmp_path, TAUGHT, f"{field}=[2, 6]")
    assert (at(config, field), at(config, most)) == (2, 6)
    assert loaded(tmp_path, TAUGHT, f"{field}=2", f"{most}=6") == config == loaded(tmp_path, TAUGHT, f"{field}=[2,6]")
    assert loaded(tmp_path, TAUGHT, f"{field}=[2, 6]", f"{most}=6") == config
    assert loaded(tmp_path, TAUGHT, f"{field}=[2, 6]", f"{most}=null") == config
    assert at(loaded(tmp_path, TAUGHT, f"{field}=3"), most) is None
    assert at(loaded(tmp_path, TAUGHT, f"{field}=[2, 2]"), most) == 2
    (tmp_path / "resolved.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "resolved.yaml") == config
    (tmp_path / "resolved.yaml").write_text(loaded(tmp_path, TAUGHT).to_yaml())
    assert load_config(tmp_path / "resolved.yaml", [f"{field}=[2, 6]"]) == config


@pytest.mark.parametrize("field", RANGES)
@pytest.mark.parametrize("value", ["[3, 1]", "[0, 2]", "[1]", "[1, 2, 3]", "[1, x]", "[]", "[1, null]", "[[1], 2]"])
def test_any_other_list_is_refused_in_one_line_that_names_the_field(field: str, value: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        loaded(tmp_path, TAUGHT, f"{field}={value}")
    said = f"field '{field}': a range is [fewest, most]: two whole numbers, 1 or more, the smaller one first, got ["
    assert said in str(error.value) and "more)" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("field", RANGES)
def test_a_range_and_another_most_are_refused_in_one_line(field: str, tmp_path: Path) -> None:
    name = field.rpartition(".")[2]
    with pytest.raises(UserError) as error:
        loaded(tmp_path, TAUGHT, f"{field}=[2, 6]", f"{RANGES[field]}=4")
    assert f"max_{name}: 4 contradicts {name}: [2, 6]" in str(error.value) and "\n" not in str(error.value)


def test_the_schema_has_both_forms_of_a_range() -> None:
    definitions = Config.model_json_schema()["$defs"]
    for section, fields in {
        "TeacherConfig": ["replicas"],
        "ScoreConfig": ["workers"],
        "SftConfig": ["workers"],
        "GrpoConfig": ["learners", "rollout_actors"],
        "EvaluateConfig": ["engines"],
    }.items():
        for field in fields:
            number, pair = definitions[section]["properties"][field]["anyOf"]
            assert number["type"] == "integer" and number["minimum"] == 1
            assert pair["items"] == number and (pair["minItems"], pair["maxItems"]) == (2, 2)
