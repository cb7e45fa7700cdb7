"""Labelled rows as tokens in one memory-mapped file."""

import asyncio
import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from transformers import AutoTokenizer

from lorapar_ray.config import GrpoConfig
from lorapar_ray.datasets.chat import Encoder
from lorapar_ray.datasets.tokens import (
    Examples,
    Questions,
    Selection,
    TokenTable,
    key_of,
    prompt_ids_of,
    write_tokens,
)
from lorapar_ray.engines.record import GroupHead
from lorapar_ray.errors import UserError
from lorapar_ray.grpo.rollouts import Rollouts
from lorapar_ray.models import resolve_model

CHAT = [{"role": "system", "content": "You add."}, {"role": "user", "content": "6 + 6?"}]


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(AutoTokenizer.from_pretrained(resolve_model("package:smollm2-135m-instruct")), "Be brief.")


@pytest.fixture(scope="module")
def table(encoder: Encoder, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, object]]]:
    folder = tmp_path_factory.mktemp("tokens")
    rows = [
        {
            **{"answer": "", "task": "", "difficulty": ""},
            "id": f"q{k}",
            "prompt": f"What is {k} + {k}?" * (1 + k % 3),
            "response": "so " * (k % 4) + str(2 * k),
            "system": 1 + k % 2,
        }
        for k in range(2050)
    ]
    rows[6] |= {"messages": CHAT, "columns": '{"value": 12}'}
    rows[7] |= {"messages": json.dumps(CHAT)}  # as earlier versions wrote it
    assert write_tokens([rows[:7], rows[7:]], encoder, folder / "tokens.arrow", "made of this") == 2050
    return folder / "tokens.arrow", rows


def test_rows_are_what_the_encoder_gives_one_by_one(
    encoder: Encoder, table: tuple[Path, list[dict[str, object]]]
) -> None:
    path, rows = table
    opened = TokenTable(path)
    assert key_of(path) == "made of this" and len(opened) == len(rows)
    for number in (0, 6, 7, 1030, 1031, 2049):
        prompt = CHAT if number in (6, 7) else str(rows[number]["prompt"])
        ids, start = encoder.example(prompt, str(rows[number]["response"]), 10**6)
        assert opened.tokens(number).tolist() == ids and opened.starts[number] == start
        assert opened.lengths[number] == len(ids) and opened.id(number) == rows[number]["id"]
    assert opened.of([2]).tolist() == [k for k in range(2050) if k % 2]


def test_rewards_get_a_question_as_it_was_written(table: tuple[Path, list[dict[str, object]]]) -> None:
    path, rows = table
    questions = pickle.loads(pickle.dumps(Questions(Selection(str(path), [1], "grpo.systems", 10**6))))
    assert len(questions) == 1025 and questions[0]["id"] == "q0" and questions[0]["messages"] == ""
    chat = questions[3]
    assert (chat["id"], chat["messages"], chat["columns"]) == ("q6", CHAT, '{"value": 12}')
    assert [chat[name] for name in ("prompt", "response")] == [rows[6][name] for name in ("prompt", "response")]
    whole = questions.excerpt(3, 10**6, of_response=1)
    assert whole[:-1] == chat["prompt_ids"] and questions.excerpt(3, 5, of_response=1) == whole[-5:]
    assert TokenTable(path).question(7)["messages"] == CHAT


def test_sampling_reads_a_prompts_tokens_and_no_text(
    table: tuple[Path, list[dict[str, object]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts are read where rewards are computed, not in the loop that serves all engines."""
    asked = []

    class Pool:  # a fake that answers at once
        async def rollout(self, key: str, prompt_ids: object, sampling: dict[str, object]) -> tuple[str, GroupHead]:
            asked.append(prompt_ids)
            return "record", GroupHead(1, (1, 1), (True, True), (0, 0))

    questions = Questions(Selection(str(table[0]), [1], "grpo.systems", 10**6))
    expected = [questions[index]["prompt_ids"] for index in (0, 3)]
    assert prompt_ids_of([{"prompt_ids": [5]}], 0) == [5]
    monkeypatch.setattr(TokenTable, "question", None)
    rollouts = Rollouts(GrpoConfig(group_size=2), {"rows": questions, "steps": 1, "seed": 0}, [], Pool(), None)  # type: ignore[arg-type]
    for index in (0, 3):
        asyncio.run(rollouts.sample(index, 0, 0))
    assert [ids.tolist() for ids in asked] == expected
    assert len(pickle.dumps(asked[0], 5)) < 4 * len(asked[0]) + 250


def test_a_file_of_an_earlier_version_is_written_anew(tmp_path: Path) -> None:
    schema = pa.schema([("id", pa.string())], metadata={"key": "made of this"})
    with pa.OSFile(str(tmp_path / "t.arrow"), "wb") as sink, pa.ipc.new_file(sink, schema):
        pass
    assert key_of(tmp_path / "t.arrow") is None


def test_examples_are_cut_when_they_are_read(table: tuple[Path, list[dict[str, object]]]) -> None:
    opened = TokenTable(table[0])
    length = int(opened.lengths[3])
    cut = Examples(opened, np.array([3, 5]), length - 1)
    assert cut.lengths[0] == len(cut[0]["input_ids"]) == length - 1
    assert cut[:][0] == cut[0] and cut[0]["response_start"] == opened.starts[3]
    assert Examples(opened, np.array([3]), 999)[0]["input_ids"] == opened.tokens(3).tolist()


def test_reading_keeps_no_copy_of_the_tokens(table: tuple[Path, list[dict[str, object]]]) -> None:
    before = pa.total_allocated_bytes()
    opened = TokenTable(table[0])
    held = pa.total_allocated_bytes() - before
    assert held < 0.1 * np.sum(opened.lengths) * 4


def test_a_sample_is_seeded_and_of_each_system(table: tuple[Path, list[dict[str, object]]]) -> None:
    opened = TokenTable(table[0])
    chosen = Selection(str(table[0]), [1, 2], "score", 512, sample=5, shuffled=True, seed=3)
    positions = chosen.positions(opened)
    assert (
        positions.tolist() == chosen.positions(opened).tolist()
        and opened.systems[positions].tolist() == [1] * 5 + [2] * 5
    )
    other = Selection(str(table[0]), [1, 2], "score", 512, 5, True, seed=4).positions(opened)
    assert positions.tolist() != other.tolist()


def test_a_prompt_that_leaves_no_room_is_left_out_and_a_missing_system_is_one_line(
    table: tuple[Path, list[dict[str, object]]],
) -> None:
    opened = TokenTable(table[0])
    limit = int(opened.starts.min()) + 1
    kept, left_out = Selection(str(table[0]), [1, 2], "sft.systems", limit).split(opened)
    assert len(kept) and (opened.starts[kept] < limit).all() and (opened.starts[left_out] >= limit).all()
    assert sorted([*kept, *left_out]) == list(range(len(opened)))
    with pytest.raises(UserError, match=r"sft.systems: no row .* System 3"):
        Selection(str(table[0]), [3], "sft.systems", 512).positions(opened)


def test_a_truncated_file_is_ignored(tmp_path: Path, table: tuple[Path, list[dict[str, object]]]) -> None:
    (tmp_path / "t.arrow").write_bytes(table[0].read_bytes()[:100])
    assert key_of(tmp_path / "t.arrow") is None and key_of(tmp_path / "none.arrow") is None
