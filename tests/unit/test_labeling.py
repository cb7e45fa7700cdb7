"""Votes, prompts, the vote store, who is asked next, and summaries."""

import asyncio
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lorapar_ray.config import LabelConfig, TeacherConfig
from lorapar_ray.config_file import load_config
from lorapar_ray.datasets.rows import Row, write_rows
from lorapar_ray.errors import UserError
from lorapar_ray.labeling.calibration import ask_probes, measured_bias
from lorapar_ray.labeling.histogram import Durations
from lorapar_ray.labeling.hosted import deployment_options, teacher_engine_arguments
from lorapar_ray.labeling.keys import teacher_keys
from lorapar_ray.labeling.panel import Panel
from lorapar_ray.labeling.pending import PendingBlocks, write_pending
from lorapar_ray.labeling.prompts import numbers, rotations, voting_prompt, with_template, with_thought
from lorapar_ray.labeling.remote import choice_log_probs, secret
from lorapar_ray.labeling.store import Answer, VoteStore, question_key
from lorapar_ray.labeling.summary import Session, Tally, render
from lorapar_ray.labeling.teachers import Asked, Refused, ShutOut, python_class
from lorapar_ray.labeling.votes import (
    Agreement,
    Vote,
    average_log_probs,
    balanced,
    binomial_majority_accuracy,
    calibrated,
    fewest_to_decide,
    lead,
    majority,
    normalised,
    number_bias,
)
from lorapar_ray.labeling.voting import vote_of, votes_of, whom_to_ask
from lorapar_ray.resources import resources_of

QUICKSTART = Path(__file__).parents[2] / "jobs" / "configs" / "quickstart.yaml"


def vote(teacher: str, system: int, confidence: float = 0.8) -> Vote:
    return Vote(teacher, system, confidence, 0.1)


def panel(*names: str, **settings: Any) -> LabelConfig:
    """A config of teachers that are never started."""
    teachers = [{"name": name, "kind": "python", "model": f"simulated:{name}"} for name in names]
    return LabelConfig.model_validate({"teachers": teachers, "calibration": "none", **settings})


def answer(log_odds: float, run: str = "") -> Answer:
    """Of two Systems; positive odds are for System 2."""
    return Answer(normalised([0.0, log_odds]), tokens=100, latency_s=0.5, run=run)


def test_majority_ties_weights_and_silence() -> None:
    decision = majority([vote("a", 1), vote("b", 2), vote("c", 2, 0.6)])
    assert decision is not None
    assert (decision.system, round(decision.agreement, 3), decision.confidence) == (2, 0.667, 0.7)
    tie = majority([vote("a", 1, 0.6), vote("b", 2, 0.9)])
    assert tie is not None and tie.system == 2
    level = majority([vote("a", 2, 0.6), vote("b", 1, 0.6)])
    assert level is not None and level.system == 1
    sure = majority([vote("a", 1, 0.55), vote("b", 1, 0.55), vote("c", 2, 1.2 - 0.05)], "confidence")
    assert sure is not None and (sure.system, round(sure.agreement, 3)) == (2, round(1.15 / 2.25, 3))
    assert majority([]) is None


@given(
    systems=st.lists(st.integers(1, 3), min_size=1, max_size=9),
    sure=st.lists(st.floats(0.34, 1.0), min_size=9, max_size=9),
    weights=st.sampled_from(["equal", "confidence"]),
)
def test_sequential_voting_ends_where_full_voting_does(systems: list[int], sure: list[float], weights: Any) -> None:
    votes = [vote(str(i), system, sure[i]) for i, system in enumerate(systems)]
    cast: list[Vote] = []
    while further := fewest_to_decide(lead(cast, weights), len(votes) - len(cast)):
        cast += votes[len(cast) : len(cast) + further]
    full, early = majority(votes, weights), majority(cast, weights)
    assert full is not None and early is not None and early.system == full.system
    if weights == "equal" and len(set(systems)) == 1:
        assert len(cast) == len(votes) // 2 + 1


@pytest.mark.parametrize("n", [1, 3, 5])
def test_the_majority_over_100_000_rows_is_as_accurate_as_the_binomial_says(n: int) -> None:
    rows, p = 100_000, 0.7
    label = panel(*map(str, range(n)), sequential=n == 5)
    keys = {teacher.name: [teacher.name.encode()] for teacher in label.teachers}
    draws = np.random.default_rng(n).random((rows, n)) < p
    correct = asked = 0
    # our code is pure, so it is asked once for each pattern of right and wrong teachers, 2^n of them among all rows
    for pattern, times in Counter(map(tuple, draws.tolist())).items():
        knows = {name: answer(-2.0 if right else 2.0) for name, right in zip(keys, pattern, strict=True)}
        found: dict[bytes, Answer] = {}
        while names := whom_to_ask(
            label, votes_of(label, keys, found, {}), [k for k in keys if k.encode() not in found]
        ):
            found |= {keys[name][0]: knows[name] for name in names}
        decision = majority(votes_of(label, keys, found, {}))
        correct += times * (decision is not None and decision.system == 1)
        asked += times * len(found)
    expected = binomial_majority_accuracy(p, n)
    assert abs(correct / rows - expected) < 3.3 * math.sqrt(expected * (1 - expected) / rows)  # 99.9 %
    assert asked == rows * n if n < 5 else asked < 0.9 * rows * n


def test_calibration_divides_the_bias_out() -> None:
    biased = [math.log(0.9), math.log(0.1)]
    assert calibrated(biased, biased) == pytest.approx([0.5, 0.5])
    assert calibrated(biased, [0.0, 0.0]) == pytest.approx([0.9, 0.1])
    assert average_log_probs([[math.log(0.2)], [math.log(0.4)]]) == pytest.approx([math.log(0.3)])
    assert vote_of("a", [answer(-1.0)], [0.0, 0.0]).system == 1
    assert vote_of("a", [answer(-1.0)], normalised([0.0, -1.5])).system == 2


@pytest.mark.parametrize("count", [2, 3])
def test_swapped_definitions_remove_a_leaning_to_a_number_exactly(count: int) -> None:
    label = panel(
        "a", definitions={k: f"kind {k}" for k in range(1, count + 1)}, examples=[], calibration="swapped_definitions"
    )
    judgement, leaning = [0.3, -0.2, 0.1][:count], [0.0, 3.0, -1.0][:count]  # by System; by number
    rotated = []
    for rotation in rotations(label):
        shown = numbers(label, rotation)
        by_number = normalised([judgement[shown.index(n + 1)] + leaning[n] for n in range(count)])
        rotated.append([by_number[number - 1] for number in shown])
    assert len(rotated) == count
    assert np.ptp(np.subtract(balanced(rotated), judgement)) < 1e-12
    assert np.ptp(np.subtract(number_bias(rotated), leaning)) < 1e-12
    assert vote_of("a", [Answer(each, 1, 0.1) for each in rotated], None).system == 1


def test_log_probabilities_are_cleaned_or_refused() -> None:
    assert normalised([-1.0, -math.inf]) == pytest.approx([0.0, -30.0], abs=1e-9)
    assert sum(map(math.exp, normalised([5.0, 4.0]))) == pytest.approx(1.0)
    for bad in ([math.nan, 0.0], [math.inf, 0.0], [-math.inf, -math.inf]):
        with pytest.raises(ValueError, match="not numbers"):
            normalised(bad)


def test_kappa_and_agreement_by_hand() -> None:
    def kappa(*rows: list[int]) -> float | None:
        agreement = Agreement()
        for row in rows:
            agreement.add([vote(str(i), system) for i, system in enumerate(row)])
        return agreement.fleiss_kappa()

    assert kappa([1, 1, 1], [2, 2, 2]) == pytest.approx(1.0)
    assert kappa([1, 2], [2, 1]) == pytest.approx(-1.0)
    assert kappa([1, 1], [1, 1]) is None
    assert kappa([1, 1], [2, 2], [1, 2], [1, 1, 2]) == pytest.approx(1 / 3)  # two raters are most common
    assert kappa([1]) is None and Agreement().fleiss_kappa() is None
    agreement = Agreement()
    agreement.add([vote("a", 1), vote("b", 1)])
    agreement.add([vote("a", 1), vote("b", 2)])
    assert agreement.pairwise() == {"a": {"b": 0.5}, "b": {"a": 0.5}}


def test_the_question_comes_last_behind_a_shared_prefix() -> None:
    label = panel("a")
    one, other = (
        voting_prompt(question, "7", label=label, teacher=label.teachers[0], student="tiny")
        for question in ("How many {x}?", "Why?")
    )
    assert one.startswith("Act as the language model tiny. Decide which System a question belongs to.\nSystem 1: the")
    assert one.endswith("Question: How many {x}?\nAnswer: 7\nSystem:")
    assert one.split("How many")[0] == other.split("Why?")[0]
    alone = panel("a", strategy="single")
    assert voting_prompt("q", "a", label=alone, teacher=alone.teachers[0], student="tiny").startswith("Decide")


def test_a_rotated_prompt_moves_numbers_places_and_examples_together() -> None:
    label = panel("a", calibration="swapped_definitions")
    plain, swapped = (
        voting_prompt("q", "a", label=label, teacher=label.teachers[0], student="s", rotation=r) for r in (0, 1)
    )
    assert "System 1: the student answers at once" in plain and "Answer: Paris\nSystem: 1" in plain
    assert "System 2: the student answers at once" in swapped and "Answer: Paris\nSystem: 2" in swapped
    assert swapped.index("System 1: the student has to reason") < swapped.index("System 2: the student answers")
    assert swapped.index("12 pens") < swapped.index("Paris")


def test_the_prompt_is_the_users_to_replace() -> None:
    own = {
        "role": "You are {student}.\n",
        "definition": "({system}) {meaning}",
        "question": "F: {question}\nA: {answer}",
    }
    label = panel("a", prompt={**own, "task": "Welche Art?", "choice": "Art:"}, definitions={1: "kurz", 2: "lang"})
    text = voting_prompt("wie?", "so", label=label, teacher=label.teachers[0], student="tiny")
    assert text.startswith("You are tiny.\nWelche Art?\n(1) kurz\n(2) lang\n\nF: What is the capital")
    assert text.endswith("F: wie?\nA: so\nArt:")
    with_chat = with_template(text, _Chat(), None, "Art:")
    assert with_chat.startswith("<user>You are tiny.") and with_chat.endswith("A: so<assistant>Art:")
    for bad in ({"question": "only {question}"}, {"task": "{who}"}, {"definition": "{"}, {"choice": "Art: "}):
        with pytest.raises(ValidationError, match=next(iter(bad))):
            panel("a", prompt=bad)


def test_a_thought_is_closed_before_the_choice_is_asked_for() -> None:
    assert with_thought("q<think>\n", "hm", "System:") == "q<think>\nhm</think>\nSystem:"
    assert with_thought("q<think>\n", "hm</think> two", "System:") == "q<think>\nhm</think> two\nSystem:"
    assert with_thought("q\n", "plain", "System:") == "q\nplain\nSystem:"


class _Chat:
    chat_template = "…"

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        return f"<user>{messages[0]['content']}<assistant>"


def test_systems_are_numbered_one_to_k() -> None:
    for bad in ({1: "a"}, {0: "a", 1: "b"}, {1: "a", 3: "b"}):
        with pytest.raises(ValidationError, match="numbered 1 to K"):
            panel("a", definitions=bad, examples=[])
    with pytest.raises(ValidationError, match="System 3 has no definition"):
        panel("a", examples=[{"question": "q", "answer": "a", "system": 3}])


def test_the_cheapest_are_asked_first_and_only_as_many_as_could_decide() -> None:
    prices = {"dear": 5.0, "free": 0.0, "cheap": 1.0}
    teachers = [{"name": n, "kind": "python", "model": "m:T", "cost_per_million_tokens": p} for n, p in prices.items()]
    label = LabelConfig.model_validate({"teachers": teachers, "sequential": True})
    assert whom_to_ask(label, [], list(prices)) == ["free", "cheap"]
    assert whom_to_ask(label, [vote("free", 1), vote("cheap", 2)], ["dear"]) == ["dear"]
    assert whom_to_ask(label, [vote("free", 1), vote("cheap", 1)], ["dear"]) == []
    assert whom_to_ask(label, [vote("free", 1)], ["dear"]) == ["dear"]  # cheap has failed: a tie may still come
    at_once = label.model_copy(update={"sequential": False})
    assert whom_to_ask(at_once, [], list(prices)) == ["free", "cheap", "dear"]


def test_a_store_keeps_answers_over_processes_and_says_what_it_is_not(tmp_path: Path) -> None:
    store = VoteStore(tmp_path / "votes.sqlite")
    keys = [question_key(f"q{i}", "a") for i in range(1000)]
    store.add(((key, b"teacher", answer(1.0, "first")) for key in keys), [("first", keys[0], "b", "TimeoutError")])
    store.close()
    again = VoteStore(tmp_path / "votes.sqlite")
    found = again.answers([*keys, question_key("unknown", "a")])
    assert len(found) == 1000 and found[keys[-1]] == {b"teacher": answer(1.0, "first")}
    assert again.failures("first", keys) == {keys[0]: {"b": "TimeoutError"}} and again.failures("other", keys) == {}
    (tmp_path / "text").write_text("no database " * 100)
    with pytest.raises(UserError, match=r"label\.cache: .*text' is not a vote cache"):
        VoteStore(tmp_path / "text")


def test_a_cached_vote_belongs_to_a_teacher_its_weights_and_the_prompt(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")

    def key(label: dict[str, Any] | None = None, **teacher: Any) -> bytes:
        config = LabelConfig.model_validate(
            {"teachers": [{"name": "a", "model": str(model), **teacher}], "calibration": "none", **(label or {})}
        )
        (found,) = teacher_keys(config, config.teachers[0], "student")
        return found

    before = key()
    assert before == key(replicas=3, max_ongoing_requests=7, resources={"cpus": 4})
    assert before == key({"concurrency": 5, "quorum": 1, "retries": 9, "sequential": True, "weights": "confidence"})
    others = [
        key(name="b"),
        key(use_chat_template=False),
        key(thinking_tokens=32),
        key(engine={"dtype": "float32"}),
        key(example_order="system2_first"),
        key({"definitions": {1: "x", 2: "y"}}),
        key({"prompt": {"task": "Which?"}}),
        key({"strategy": "single"}),
    ]
    (model / "config.json").write_text('{"retrained": true}')
    others.append(key())
    assert len({before, *others}) == len(others) + 1


def rows_file(folder: Path, count: int) -> Path:
    write_rows(folder / "train.parquet", (Row(f"r{i}", f"q{i}", "1", "1", "sum") for i in range(count)))
    return folder / "train.parquet"


def test_five_teachers_after_three_ask_only_the_new_two(tmp_path: Path) -> None:
    names = ["a", "b", "c", "d", "e"]
    three, five = panel(*names[:3], rows_per_block=8), panel(*names, rows_per_block=8)
    keys = {teacher.name: teacher_keys(five, teacher, "s") for teacher in five.teachers}
    rows, store = rows_file(tmp_path, 20), VoteStore(tmp_path / "votes.sqlite")
    target = tmp_path / "pending.parquet"
    first = write_pending(target, rows, store, three, keys, {}, names[:3])
    assert (first.blocks, first.questions) == (3, 20)
    digests = [question_key(f"q{i}", "1") for i in range(20)]
    store.add((digest, keys[name][0], answer(1.0)) for digest in digests for name in names[:3])
    assert write_pending(target, rows, store, three, keys, {}, names[:3]).blocks == 0
    assert write_pending(target, rows, store, five, keys, {}, names).questions == 20
    question = PendingBlocks(str(target)).read(2)[0]
    assert (question.prompt, sorted(question.known)) == ("q16", ["a", "b", "c"])
    sequential = panel(*names, sequential=True)  # three of five have already agreed
    assert write_pending(target, rows, store, sequential, keys, {}, names).questions == 0


def test_bias_is_measured_from_stored_answers(tmp_path: Path) -> None:
    label = panel("a", "b", calibration="content_free")
    keys, probes = {"a": [b"a"], "b": [b"b"]}, [("N/A", "N/A"), ("…", "N/A")]
    store = VoteStore(tmp_path / "votes.sqlite")
    store.add((question_key(*probe), b"a", answer(odds)) for probe, odds in zip(probes, (-1.0, -2.0), strict=True))
    bias = measured_bias(label, keys, store, probes)
    assert set(bias) == {"a"}
    assert bias["a"] == pytest.approx(average_log_probs([answer(-1.0).log_probs, answer(-2.0).log_probs]))
    assert measured_bias(panel("a", "b"), keys, store, []) == {}


def test_choices_are_found_among_an_endpoints_alternatives() -> None:
    assert choice_log_probs([(" 1", -0.5), ("1", -2.0), ("the", -3.0)], ["1", "2"]) == [-0.5, -4.0]
    for bad in ([("the", -0.1)], []):
        with pytest.raises(ValueError, match="no choice"):
            choice_log_probs(bad, ["1", "2"])


def test_placement_and_scaling_come_from_the_config() -> None:
    def teacher(**settings: Any) -> TeacherConfig:
        return TeacherConfig.model_validate({"name": "t", "model": "owner/name", **settings})

    plain = deployment_options(teacher(resources={"cpus": 2}))
    assert plain["num_replicas"] == 1 and plain["max_ongoing_requests"] == 96  # half as many again as max_num_seqs
    assert plain["ray_actor_options"]["num_cpus"] == 2 and plain["ray_actor_options"]["num_gpus"] == 0
    scaled = deployment_options(teacher(replicas=2, max_replicas=5, engine={"max_num_seqs": 128}))
    assert scaled["autoscaling_config"] == {"min_replicas": 2, "max_replicas": 5, "target_ongoing_requests": 128}
    half = teacher(resources={"gpus": 0.5})
    assert teacher_engine_arguments(half, 0)["gpu_memory_utilization"] == 0.45
    own = teacher(resources={"gpus": 0.5}, engine={"extra": {"gpu_memory_utilization": 0.3}})
    assert teacher_engine_arguments(own, 0)["gpu_memory_utilization"] == 0.3
    wide = teacher(resources={"gpus": 4}, engine={"tensor_parallel": 4}, revision="v1")
    assert deployment_options(wide)["ray_actor_options"]["num_gpus"] == 4
    arguments = teacher_engine_arguments(wide, 0)
    assert (arguments["tensor_parallel_size"], arguments["revision"]) == (4, "v1")
    for gpus, ranks in ((1, 4), (0.5, 2), (2, 1)):
        with pytest.raises(ValidationError, match=r"resources\.gpus"):
            teacher(resources={"gpus": gpus}, engine={"tensor_parallel": ranks})
    with pytest.raises(ValidationError, match="max_replicas"):
        teacher(replicas=3, max_replicas=2)


def test_what_a_teacher_lacks_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="teacher 'a': no class 'simulated:a'"):
        python_class(panel("a").teachers[0])
    monkeypatch.delenv("LORAPAR_NO_SUCH_KEY", raising=False)
    remote = {"name": "far", "kind": "remote", "model": "m", "base_url": "http://127.0.0.1:1"}
    teacher = TeacherConfig.model_validate({**remote, "api_key_env": "LORAPAR_NO_SUCH_KEY"})
    with pytest.raises(UserError, match="teacher 'far': environment variable LORAPAR_NO_SUCH_KEY is not set"):
        secret(teacher)
    monkeypatch.setenv("LORAPAR_NO_SUCH_KEY", "s3cret")
    assert secret(teacher) == "s3cret" and secret(TeacherConfig.model_validate(remote)) is None


class Moody:
    """Fault injection: fails as its name says."""

    def __init__(self, teacher: TeacherConfig) -> None:
        self._name = teacher.name

    async def ask(self, prompt: str, choices: list[str]) -> Asked:
        if self._name == "well":
            return Asked([-0.1, -2.0], 7, 0.01)
        raise {"picky": Refused, "locked": ShutOut, "down": ConnectionError}[self._name](f"{self._name}!")


def test_a_teacher_is_given_up_for_its_own_failures_and_not_for_the_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    names, slept = ("well", "picky", "locked", "down"), []
    teachers = [{"name": name, "kind": "python", "model": f"{__name__}:Moody"} for name in names]
    label = LabelConfig.model_validate({"teachers": teachers, "give_up_after": 3, "retries": 2, "quorum": 3})

    async def no_sleep(seconds: float) -> None:
        slept.append(seconds)

    async def ask_all() -> Panel:
        asked = Panel(label, {}, {}, "student")
        for question in range(5):
            for teacher in label.teachers:
                found = await asked.ask(teacher, f"q{question}", "1")
                assert isinstance(found, list) == (teacher.name == "well")
        return asked

    monkeypatch.setattr("lorapar_ray.labeling.panel.asyncio.sleep", no_sleep)
    asked = asyncio.run(ask_all())
    assert set(asked.dead) == {"locked", "down"} and asked.quorum_lost
    assert asked.dead["down"] == "3 failures in a row, the last: ConnectionError: down!"
    assert slept == [1.0, 2.0] * 3  # only what may mend itself is tried again, and nothing once it is given up


def test_a_probe_that_a_teacher_refused_before_does_not_silence_it(tmp_path: Path) -> None:
    teachers = [{"name": name, "kind": "python", "model": f"{__name__}:Moody"} for name in ("well", "down")]
    label = LabelConfig.model_validate({"teachers": teachers, "retries": 0})
    keys, store = {"well": [b"w"], "down": [b"d"]}, VoteStore(tmp_path / "votes.sqlite")
    probes = [("long", "1"), ("short", "1")]
    store.add((question_key("short", "1"), key, answer(1.0)) for key in (b"w", b"d"))

    class RefusesLong(Moody):
        async def ask(self, prompt: str, choices: list[str]) -> Asked:
            if "Question: long" in prompt:
                raise Refused("too long")
            return await super().ask(prompt, choices)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(f"{__name__}.Moody", RefusesLong)
        silent = asyncio.run(ask_probes(Panel(label, {}, {}, "s"), label, keys, store, probes, []))
    assert list(silent) == ["down"]


def test_dry_run_says_what_each_teacher_asks_for() -> None:
    config = load_config(QUICKSTART)
    teachers = [
        {"name": "big", "model": "o/n", "max_replicas": 4, "engine": {"tensor_parallel": 2}, "resources": {"gpus": 2}},
        {"name": "far", "kind": "remote", "model": "m", "base_url": "http://host/v1", "requests_per_second": 5},
        {"name": "own", "kind": "python", "model": "module:Class"},
    ]
    label = LabelConfig.model_validate({"teachers": teachers, "workers": 2})
    said = resources_of(config.model_copy(update={"label": label}))["label"]
    assert said == (
        "1 to 4 × big (1 CPU + 2 GPU, tensor parallel 2, 96 requests), "
        "far (remote, completions at http://host/v1, at most 5 requests/s), "
        "own (module:Class, in the asking worker), 2 × asking worker (0.5 CPU), 128 questions in flight"
    )


def test_percentiles_of_a_stream_are_those_of_the_list() -> None:
    values, durations = np.random.default_rng(0).lognormal(size=5000), Durations()
    assert durations.percentile(50) is None
    for value in values:
        durations.add(float(value))
    for share in (50, 95, 99):
        assert durations.percentile(share) == pytest.approx(float(np.percentile(values, share)), rel=0.03)


def test_the_summary_counts_what_happened() -> None:
    teachers = [
        {"name": "a", "model": "m", "cost_per_million_tokens": 1000.0, "cost_per_hour": 36.0},
        {"name": "b", "model": "m"},
    ]
    label = LabelConfig.model_validate({"teachers": teachers})
    tally = Tally(label, {"a": [math.log(0.6), math.log(0.4)]}, seed=0, run="now")
    for i in range(3):
        row = Row(str(i), f"q{i}", "1", "1", "sum" if i else "count")
        votes = [vote("a", 1), *([vote("b", 2)] if i else [])]
        answers = {"a": [answer(-1.0, "now")], **({"b": [answer(1.0, "earlier")]} if i else {})}
        tally.add(row, 1, votes, answers, failed=[] if i else ["b"])
    tally.abstain(["a", "b"])
    session = Session(run="now", votes=3, starting_s=8.0, asking_s=2.0, dead={"b": "16 failures in a row"})
    summary = tally.summary(rejected=1, session=session)
    assert summary["split"] == {"1": 3, "2": 0}
    a, b = summary["teachers"]["a"], summary["teachers"]["b"]
    assert (a["abstained"], b["abstained"], a["not_asked"], b["from_cache"]) == (1, 2, 0, 2)
    assert a["bias"]["1"] - a["bias"]["2"] == pytest.approx(math.log(0.6 / 0.4), abs=1e-3)
    assert a["cost"] == pytest.approx(300 * 1000 / 1e6 + 36 * 10 / 3600, abs=1e-4)
    assert a["latency"]["p50"] == pytest.approx(0.5, rel=0.02) and summary["tokens"] == 500
    assert summary["by_task"] == {"count": {"1": 1, "2": 0}, "sum": {"1": 2, "2": 0}}
    assert summary["disagreeing"] == len(summary["disagreements"]) == 2
    assert sum(summary["confidence_histogram"]["counts"]) == 5
    assert (summary["votes_asked"], summary["votes_from_cache"], summary["votes_possible"]) == (3, 2, 8)
    assert summary["votes_per_second"] == 1.5
    shown = render(summary)
    assert "no question is labelled System 2" in shown and "teacher b was given up: 16 failures" in shown
    assert "3 of 8 votes asked for (62 % saved: 2 from the cache)" in shown
    json.dumps(summary, allow_nan=False)


def test_the_sample_of_disagreements_is_even_and_bounded() -> None:
    shown: Counter[str] = Counter()
    for seed in range(300):
        tally = Tally(panel("a", "b"), {}, seed)
        for i in range(20):
            answers = {"a": [answer(-1.0)], "b": [answer(1.0)]}
            tally.add(Row(str(i), f"q{i}", "1", "1", "t"), 1, [vote("a", 1), vote("b", 2)], answers)
        summary = tally.summary(0, Session())
        assert len(summary["disagreements"]) == 8 and summary["disagreeing"] == 20
        shown.update(entry["prompt"] for entry in summary["disagreements"])
    assert len(shown) == 20 and max(shown.values()) < 1.5 * min(shown.values())
