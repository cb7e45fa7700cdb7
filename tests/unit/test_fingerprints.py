"""Digests of inputs and results: which contents they are of, and which they leave out."""

import hashlib
import json
import os
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lorapar_ray.files import digest
from lorapar_ray.fingerprints import Fingerprints, meaning
from lorapar_ray.user_modules import user_modules


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
