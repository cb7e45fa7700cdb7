"""Stored answers, across processes, teachers and prompts."""

import os
from pathlib import Path
from typing import Any

import pytest

from lorapar_ray.config import Config, LabelConfig
from lorapar_ray.errors import UserError
from lorapar_ray.fingerprints import Fingerprints
from lorapar_ray.labeling.calibration import measured_bias
from lorapar_ray.labeling.job import _store
from lorapar_ray.labeling.journal import is_networked, segments
from lorapar_ray.labeling.keys import revision, teacher_keys, weights_here
from lorapar_ray.labeling.pending import PendingBlocks, write_pending
from lorapar_ray.labeling.store import VoteStore, question_key
from lorapar_ray.labeling.votes import (
    average_log_probs,
)
from lorapar_ray.runs import RunDirectory
from tests.unit.votes import answer, panel, rows_file


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
        (found,) = teacher_keys(config, config.teachers[0], "student", Fingerprints(tmp_path / "none"))
        return found

    before = key()
    os.utime(model / "config.json", (1, 1))
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


def test_weights_have_one_name_on_every_machine(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for model in (str(tmp_path), "package:smollm2-135m-instruct"):
        teacher = LabelConfig.model_validate({"teachers": [{"name": "a", "model": model}]}).teachers[0]
        assert revision(teacher, Fingerprints(tmp_path / "none")) == weights_here(model) != ""
    with pytest.raises(UserError, match="no such directory"):
        weights_here(str(tmp_path / "elsewhere"))
    with pytest.raises(UserError, match=r"'package:other': unknown"):
        weights_here("package:other")


def test_five_teachers_after_three_ask_only_the_new_two(tmp_path: Path) -> None:
    names = ["a", "b", "c", "d", "e"]
    three, five = panel(*names[:3], rows_per_block=8), panel(*names, rows_per_block=8)
    keys = {teacher.name: teacher_keys(five, teacher, "s", Fingerprints(tmp_path)) for teacher in five.teachers}
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


def test_votes_are_rebuilt_from_their_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorapar_ray.labeling.journal.SEGMENT_BYTES", 200)
    folder, keys = tmp_path / "votes", [question_key(f"q{i}", "a") for i in range(6)]
    here = tmp_path / "votes.sqlite"
    store = VoteStore(here, folder)
    for number, key in enumerate(keys[:4]):
        store.add([(key, b"t", answer(number, "run"))], [("run", key, "b", "TimeoutError")])
    store.add([(keys[0], b"t", answer(9.0, "run"))])
    store.close()
    assert len(list(folder.iterdir())) > 1
    last = sorted(folder.iterdir())[-1]
    last.write_bytes(last.read_bytes() + b'{"answers": [["ab')  # a kill cut it off
    again = VoteStore(here, folder)
    again.add([(keys[4], b"t", answer(4.0))])
    again.close()
    assert not here.exists()
    found = VoteStore(here, folder).answers(keys)
    assert {key: each[b"t"].log_probs for key, each in found.items()} == {
        key: answer(odds).log_probs for key, odds in zip(keys, (9.0, 1.0, 2.0, 3.0, 4.0), strict=False)
    }
    last.write_bytes(b"no JSON\n")
    with pytest.raises(UserError, match=r"votes' is not a vote cache \(a line is damaged"):
        VoteStore(here, folder)


def test_votes_of_a_file_are_taken_over_into_a_journal_once(tmp_path: Path) -> None:
    file, folder, keys = tmp_path / "votes.sqlite", tmp_path / "votes", [question_key(f"q{i}", "a") for i in range(3)]
    store = VoteStore(file)
    store.add([(key, b"t", answer(1.0, "run")) for key in keys[:2]], [("run", keys[2], "t", "TimeoutError")])
    store.close()
    newer = VoteStore(tmp_path / "none.sqlite", folder)
    newer.add([(keys[0], b"t", answer(2.0))])
    newer.close()
    for _ in range(2):
        both = VoteStore(file, folder)
        found = both.answers(keys)
        assert {key: each[b"t"].log_probs for key, each in found.items()} == {
            keys[0]: answer(2.0).log_probs,
            keys[1]: answer(1.0).log_probs,
        }
        assert both.failures("run", keys) == {keys[2]: {"t": "TimeoutError"}}
        both.close()
    lines = [line for each in segments(folder) for line in each.read_text().splitlines()]
    assert len(lines) == 3  # the newer answer, the other answer, and the failure
    file.write_text("no database")
    with pytest.raises(UserError, match=r"votes\.sqlite' is not a vote cache"):
        VoteStore(file, folder)
    file.write_text("")
    VoteStore(file, folder).close()


def test_processes_that_share_a_journal_write_files_of_their_own(tmp_path: Path) -> None:
    keys = [question_key(f"q{i}", "a") for i in range(4)]
    stores = [VoteStore(tmp_path / "none.sqlite", tmp_path / "votes") for _ in range(2)]
    for number, key in enumerate(keys):
        stores[number % 2].add([(key, b"t", answer(1.0))])
    assert len(segments(tmp_path / "votes")) == 2
    assert set(VoteStore(tmp_path / "none.sqlite", tmp_path / "votes").answers(keys)) == set(keys)


@pytest.mark.parametrize("grid", [False, True])
def test_a_network_file_system_gets_a_journal_that_goes_on_elsewhere(
    grid: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "grid" / "votes.sqlite" if grid else None
    tree = {"name": "x", "model": {"path": "m"}, "data": {"train": [{"reader": "file", "path": "rows.jsonl"}]}}
    config = Config.model_validate({**tree, "label": {**panel("a").model_dump(), "cache": cache and str(cache)}})
    run, keys = RunDirectory(tmp_path / "run"), [question_key(f"q{i}", "a") for i in range(3)]
    file = cache or run.work / "votes.sqlite"
    journal = tmp_path / "grid" / "votes.sqlite.journal" if grid else run.work / "votes"
    for number, networked in enumerate([False, True, False]):  # an older version's file, then two moves
        monkeypatch.setattr("lorapar_ray.labeling.job.is_networked", lambda _, there=networked: there)
        before, store = file.read_bytes() if number else b"", _store(config, run)
        assert set(store.answers(keys)) == set(keys[:number])
        store.add([(keys[number], b"t", answer(1.0))])
        store.close()
        assert bool(segments(journal)) == bool(number)
        assert number == 0 or file.read_bytes() == before


def test_file_systems_that_machines_share_are_known() -> None:
    mounts = (
        "21 1 8:1 / / rw - ext4 /dev/sda1 rw\n"
        "30 21 0:40 / /shared rw - nfs4 server:/x rw\n"
        r"31 30 0:41 / /shared/my\040scratch rw - tmpfs tmpfs rw" + "\n"
        "32 21 0:42 / /lustre rw - lustre m:/l rw\n"
        "damaged\n"
    )
    for path, networked in {
        "/home/x": False,
        "/shared": True,
        "/shared/runs/x/work": True,
        "/sharedother": False,
        "/shared/my scratch/x": False,
        "/lustre/x": True,
    }.items():
        assert is_networked(Path(path), mounts) is networked, path
