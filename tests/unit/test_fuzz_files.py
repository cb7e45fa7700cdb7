"""No user's file and no file of a run ends in a traceback: each gives one line, or is read correctly.

With `test_fuzz_config.py` these are more than 2,000 inputs, the same on every machine.
"""

import gzip
import io
import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from lorapar_ray.adapters.given import require_lora, take_over
from lorapar_ray.adapters.store import CONFIG, WEIGHTS, load_adapter
from lorapar_ray.boundary import parquet_batches
from lorapar_ray.config import ModelConfig, NamedSource
from lorapar_ray.config.data import FileSource
from lorapar_ray.config_file import load_config
from lorapar_ray.datasets.rows import COLUMNS, Row, count_rows, iterate_rows, read_table, write_rows
from lorapar_ray.datasets.sources import read_source
from lorapar_ray.datasets.tokens import prompt_of
from lorapar_ray.errors import UserError
from lorapar_ray.files import write_json
from lorapar_ray.importance import GradSums
from lorapar_ray.labeling.job import _known_bias, _run_id
from lorapar_ray.labeling.output import LABEL_SCHEMA
from lorapar_ray.labeling.store import Answer, VoteStore
from lorapar_ray.partition.job import partition_stage
from lorapar_ray.partition.regions import load_regions
from lorapar_ray.partition.systems import mask_of_systems
from lorapar_ray.pipeline import standings
from lorapar_ray.plan import plan
from lorapar_ray.reporting.data import read_run
from lorapar_ray.reporting.page import _drawable, write_report
from lorapar_ray.running import require_leave
from lorapar_ray.runs import RunDirectory
from lorapar_ray.sft.checkpoint import (
    OPTIMIZER,
    PARAMETERS,
    STATE,
    Progress,
    last_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from lorapar_ray.student import load_base, load_tokenizer
from lorapar_ray.tensortree import load_tree, save_tree
from tests.unit.fuzzing import changed, damaged, damaged_json, damaged_lines, fuzzed, one_line_or_accepted
from tests.unit.partition_scores import skewed
from tests.unit.test_given_adapter import base
from tests.unit.test_given_adapter import given as given_adapter
from tests.unit.test_readme_and_report import QUICKSTART, result

RECORDS = [{"id": str(k), "prompt": f"What is {k} plus 1?", "answer": str(k + 1), "context": "sum"} for k in range(3)]
ROWS = [Row(str(k), f"What is {k} plus 1?", str(k + 1), str(k + 1), "sums") for k in range(3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One directory for all inputs: each overwrites the one before."""
    return tmp_path_factory.mktemp("fuzz")


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def parquet(rows: list[dict[str, Any]], schema: pa.Schema | None = None) -> bytes:
    written = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), written)
    return written.getvalue()


def read_file(path: Path) -> list[Row]:
    found = list(read_source(FileSource(reader="file", path=str(path)), "data.train[0]"))
    rows = [row for row in found if isinstance(row, Row)]  # others are listed as lost
    texts = [{**vars(row), "messages": "", "system": ""} for row in rows]
    assert found and all(isinstance(value, str) for row in texts for value in row.values())
    assert all(isinstance(each["content"], str) for row in rows for each in row.messages)
    assert all(row.prompt.strip() and row.answer.strip() for row in rows)
    return rows


@fuzzed(300)
@given(content=damaged_lines(RECORDS))
def test_jsonl_of_the_users(folder: Path, content: bytes) -> None:
    one_line_or_accepted(lambda: read_file(put(folder / "data.jsonl", content)))


@fuzzed(150)
@given(content=damaged_json(RECORDS))
def test_json_lists_of_the_users(folder: Path, content: bytes) -> None:
    one_line_or_accepted(lambda: read_file(put(folder / "data.json", content)))


@fuzzed(150)
@given(
    content=st.one_of(
        damaged(gzip.compress(json.dumps(RECORDS).encode(), mtime=0)),
        damaged_lines(RECORDS).map(partial(gzip.compress, mtime=0)),
    )
)
def test_gzipped_json_of_the_users(folder: Path, content: bytes) -> None:
    one_line_or_accepted(lambda: read_file(put(folder / "data.jsonl.gz", content)))


@fuzzed(150)
@given(content=damaged(parquet(RECORDS)))
def test_parquet_of_the_users(folder: Path, content: bytes) -> None:
    one_line_or_accepted(lambda: read_file(put(folder / "data.parquet", content)))


NAMED: dict[str, dict[str, Any]] = {
    "gsm8k": {"question": "q", "answer": "so #### 4"},
    "boolq": {"question": "q", "passage": "p", "answer": True},
    "svamp": {"Body": "b", "Question": "q", "Answer": 3.0, "Equation": "1+2"},
    "mawps": {"Question": "q", "Answer": "3", "Numbers": "1 2"},
    "mmlu": {"question": "q", "choices": ["a", "b", "c", "d"], "answer": 2, "subject": "s"},
    "dolly": {"instruction": "i", "context": "", "response": "r", "category": "c"},
    "openplatypus": {"instruction": "i", "input": "", "output": "o", "data_source": "d"},
    "codealpaca": {"instruction": "i", "input": "", "output": "o"},
    "codefeedback": {"query": "q", "answer": "a", "lang": "python"},
}


@fuzzed(250)
@given(reader=st.sampled_from(sorted(NAMED)), data=st.data())
def test_benchmark_files_of_the_users(folder: Path, reader: str, data: st.DataObject) -> None:
    content = data.draw(damaged_lines([NAMED[reader]]))
    source = NamedSource.model_validate({"reader": reader, "path": str(put(folder / "named.jsonl", content))})
    one_line_or_accepted(lambda: list(read_source(source, "data.test[0]")))


def rows_file(folder: Path) -> bytes:
    write_rows(folder / "good.parquet", ROWS)
    return (folder / "good.parquet").read_bytes()


@fuzzed(100)
@given(data=st.data())
def test_questions_of_a_run(folder: Path, data: st.DataObject) -> None:
    file = put(folder / "train.parquet", data.draw(damaged(rows_file(folder))))
    for read in (lambda: list(iterate_rows(file)), lambda: read_table(file, COLUMNS), lambda: count_rows(file)):
        one_line_or_accepted(read)


VOTES = [{"teacher": "a", "system": 1, "confidence": 0.9, "latency_s": 0.1}]
LABELS = [
    {**vars(row), "system": 1 + k % 2, "agreement": 1.0, "confidence": 0.9, "votes": VOTES}
    for k, row in enumerate(ROWS)
]


@fuzzed(100)
@given(content=damaged(parquet(LABELS, LABEL_SCHEMA)))
def test_labels_of_a_run(folder: Path, content: bytes) -> None:
    run = RunDirectory(folder / "labelled")
    put(run.labels / "part-00000.parquet", content)
    batches = parquet_batches(run.labels / "part-00000.parquet", COLUMNS | {"system": int}, 2)
    found = one_line_or_accepted(lambda: [prompt_of(row) for rows in batches for row in rows])
    assert found is None or all(isinstance(prompt, str | list) for prompt in found)


@pytest.fixture(scope="module")
def adapter(folder: Path) -> Path:
    return given_adapter(folder / "adapter")


def break_adapter(folder: Path, adapter: Path, data: st.DataObject) -> Path:
    config, weights = (adapter / CONFIG).read_bytes(), (adapter / WEIGHTS).read_bytes()
    if data.draw(st.booleans()):
        config = data.draw(damaged_json(json.loads(config)))
    else:
        weights = data.draw(damaged(weights))
    broken = put(folder / "broken" / CONFIG, config).parent
    put(broken / WEIGHTS, weights)
    return broken


@fuzzed(100)
@given(data=st.data())
def test_a_users_adapter(folder: Path, adapter: Path, data: st.DataObject) -> None:
    one_line_or_accepted(lambda: require_lora(break_adapter(folder, adapter, data)))


@fuzzed(12)
@given(data=st.data())
def test_taking_over_a_users_adapter(folder: Path, adapter: Path, data: st.DataObject) -> None:
    broken = break_adapter(folder, adapter, data)

    def take() -> float:
        require_lora(broken)
        return take_over(base(), broken, folder / "taken", "m")

    gap = one_line_or_accepted(take)
    assert gap is None or gap < 1e-3
    one_line_or_accepted(lambda: load_adapter(base(), broken))


@pytest.fixture(scope="module")
def scored(folder: Path) -> RunDirectory:
    """A run with everything that `partition` reads."""
    run = RunDirectory(folder / "scored")
    phi = skewed(9)
    put(run.adapter / CONFIG, b"{}")
    save_file(phi, run.adapter / WEIGHTS)
    run.scores.mkdir()
    for system in (1, 2):
        save_file(skewed(system), run.scores / f"system{system}.safetensors")
        for unit in (0, 1):
            first = skewed(10 * system + unit)
            sums = GradSums(4, first, {key: value**2 for key, value in first.items()})
            sums.save(run.work / "score" / f"system{system}" / f"unit-0000{unit}.safetensors")
    partition_stage(load_config(QUICKSTART), run)
    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    "place",
    ["scores/system1.safetensors", "adapter/adapter_model.safetensors", "work/score/system2/unit-00001.safetensors"],
)
@fuzzed(5)
@given(data=st.data())
def test_files_that_partition_reads(scored: RunDirectory, place: str, data: st.DataObject) -> None:
    file = scored.root / place
    good = file.read_bytes()
    config = load_config(QUICKSTART)
    try:
        put(file, data.draw(damaged(good)))
        one_line_or_accepted(lambda: partition_stage(config, scored))
    finally:
        put(file, good)


KEYS = st.sampled_from(["a.lora_A.weight", "first.a", "second.a", "tree", ""])
TENSORS = st.dictionaries(
    KEYS,
    st.sampled_from([torch.zeros(2, 3), torch.full((2, 3), torch.nan), torch.ones(4, dtype=torch.int64), torch.tensor(1.0),  # noqa: E501
                     torch.ones(0), torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(2, dtype=torch.bool)]),
    max_size=3,
)  # fmt: skip
METADATA = st.one_of(st.none(), st.dictionaries(st.sampled_from(["n", "cut", "tree"]), st.sampled_from(
    ["", "4", "-1", "{}", "[]", "null", '{"theta": 0.9, "alpha": 1, "beta": "x"}', '{"__items__": 3}', '{"__tensor__": "t9"}',  # noqa: E501
     "[" * 100_000, "9" * 5000]), max_size=3))  # fmt: skip


@fuzzed(150)
@given(tensors=TENSORS, metadata=METADATA)
def test_whole_safetensors_that_hold_something_else(
    folder: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None
) -> None:
    file = put(folder / "other.safetensors", save({key: value.clone() for key, value in tensors.items()}, metadata))
    for read in (load_regions, partial(mask_of_systems, systems=[1, 2]), GradSums.load, load_tree):
        one_line_or_accepted(lambda read=read: read(file))  # type: ignore[misc]


@fuzzed(80)
@given(data=st.data())
def test_regions_and_sums(scored: RunDirectory, folder: Path, data: st.DataObject) -> None:
    places: list[tuple[Path, Callable[[Path], Any]]] = [
        (scored.partition / "regions.safetensors", load_regions),
        (scored.work / "score" / "system1" / "unit-00000.safetensors", GradSums.load),
    ]
    good, read = data.draw(st.sampled_from(places))
    file = put(folder / "one.safetensors", data.draw(damaged(good.read_bytes())))
    one_line_or_accepted(lambda: read(file))


class Plain(torch.optim.SGD):
    """An optimiser with a state."""


@fuzzed(60)
@given(data=st.data())
def test_checkpoints(folder: Path, data: st.DataObject) -> None:
    parameters = {"a": torch.nn.Parameter(torch.ones(2, 3))}
    optimizer = Plain(list(parameters.values()), lr=0.1, momentum=0.9)
    parameters["a"].grad = torch.ones(2, 3)
    optimizer.step()
    home = folder / "checkpoints"
    for step in (1, 2):
        save_checkpoint(home, 0, 1, Progress(step), parameters, optimizer)
    name = data.draw(st.sampled_from([PARAMETERS, OPTIMIZER, STATE, "rng-0.safetensors"]))
    newest = home / "checkpoint-2" / name
    good = newest.read_bytes()
    if name == STATE:
        put(newest, data.draw(damaged_json(json.loads(good))))
    elif data.draw(st.booleans()):
        put(newest, data.draw(damaged(good)))
    else:
        save_tree(
            newest,
            data.draw(changed({"optimizer": {"state": {}, "param_groups": []}, "python": [3, [1], None], "a": 1})),
        )
    found = last_checkpoint(home, 1)
    assert (found is not None and found[1] in (1, 2)) or name == STATE
    drawn = random.getstate()
    for checkpoint in home.iterdir():
        one_line_or_accepted(lambda checkpoint=checkpoint: load_checkpoint(checkpoint, 0, parameters, optimizer))  # type: ignore[misc]
    random.setstate(drawn)


LINE = {"step": 1, "reward": 0.5, "completion_length": 3.0, "ratio_mean": 1.0, "seconds/rollout": 1.0, "loss": 2.0}
SAMPLE = {"step": 1, "prompt": "q", "completion": "c\u2028d", "answer": "1", "reward": 0.5}
TEACHER = {
    "model": "m", "split": {"1": 2, "2": 1}, "abstained": 0, "not_asked": 0, "given_up": None, "bias": {"1": 0.5, "2": -0.5},  # noqa: E501
    "mean_confidence": 0.8, "latency": {"p50": 0.1}, "tokens": 12, "from_cache": 0, "cost": 0.0,
}  # fmt: skip
SUMMARY = {
    "strategy": "vote", "calibration": "batch", "weights": "equal", "sequential": False, "rows": 3, "rejected": 0,
    "split": {"1": 2, "2": 1}, "teachers": {"a": TEACHER}, "pairwise_agreement": {}, "fleiss_kappa": None,
    "confidence_histogram": {"edges": [0.5, 0.75, 1.0], "counts": [1, 2]}, "by_task": {"a$b$": {"1": 2, "2": 1}},
    "disagreements": [], "disagreeing": 0, "votes": 3, "votes_possible": 3, "votes_from_cache": 0,
    "votes_asked": 3, "tokens": 12, "cost": 0.0, "seconds_starting": 1.0, "seconds": 1.0, "votes_per_second": 3.0, "warnings": [],  # noqa: E501
}  # fmt: skip
SHOWN: dict[str, Any] = {
    "metrics/grpo.jsonl": [LINE, {**LINE, "step": 2}],
    "metrics/sft.jsonl": [LINE],
    "metrics/samples.jsonl": [SAMPLE],
    "metrics/labels.json": SUMMARY,
    "eval/base.json": result(20, 100, 0.13, 0.29),
    "eval/sft.json": result(50, 100, 0.40, 0.60),
}


@pytest.fixture(scope="module")
def shown(folder: Path, scored: RunDirectory) -> RunDirectory:
    """A run with everything that the report reads."""
    run = RunDirectory(folder / "shown")
    for name, value in SHOWN.items():
        lines = "".join(json.dumps(line) + "\n" for line in value) if name.endswith("l") else json.dumps(value)
        put(run.root / name, lines.encode())
    put(run.partition / "summary.json", (scored.partition / "summary.json").read_bytes())
    write_report(load_config(QUICKSTART), run)
    return run


def shown_files(run: RunDirectory) -> dict[str, Any]:
    return {**SHOWN, "partition/summary.json": json.loads((run.root / "partition" / "summary.json").read_text())}


@fuzzed(150)
@given(data=st.data())
def test_files_that_the_report_reads(shown: RunDirectory, data: st.DataObject) -> None:
    name, value = data.draw(st.sampled_from(sorted(shown_files(shown).items(), key=str)))
    good = (shown.root / name).read_bytes()
    try:
        put(shown.root / name, data.draw(damaged_lines(value) if name.endswith("l") else damaged_json(value)))
        one_line_or_accepted(lambda: read_run(load_config(QUICKSTART), shown))
    finally:
        put(shown.root / name, good)


@pytest.mark.slow
@fuzzed(5)
@given(data=st.data())
def test_the_whole_report(shown: RunDirectory, folder: Path, data: st.DataObject) -> None:
    """A run with only one damaged file: its plots and the page."""
    name, value = data.draw(st.sampled_from(sorted(shown_files(shown).items(), key=str)))
    run = RunDirectory(folder / "page")
    for old in run.root.rglob("*.json*"):
        old.unlink()
    tree = data.draw(changed(value))
    put(
        run.root / name,
        "".join(json.dumps(line) + "\n" for line in tree).encode() if name.endswith("l") else json.dumps(tree).encode(),
    )
    one_line_or_accepted(lambda: write_report(load_config(QUICKSTART), run))


@pytest.fixture(scope="module")
def opened(folder: Path) -> RunDirectory:
    """A run with one finished stage."""
    run = RunDirectory(folder / "opened")
    run.open(load_config(QUICKSTART))
    put(run.data / "train.parquet", b"x")
    entry: dict[str, Any] = {
        **{"status": "done", "inputs": {"settings": {"seed": 1}, "sources": {}, "files": {"a": "0"}}, "seconds": 1.5},
        **{"outputs": "0" * 64, "written": {"data/train.parquet": [1, "0"]}, "versions": {"ray": "2"}},
    }
    run.record("label", **entry)
    run.record("score", **entry)
    return run


@fuzzed(80)
@given(data=st.data())
def test_the_manifest_and_its_cache_of_digests(opened: RunDirectory, data: st.DataObject) -> None:
    config, good = load_config(QUICKSTART), opened.manifest_path.read_bytes()
    stages = json.loads(good)
    entries = damaged_json(stages) | changed(stages["stages"]).map(
        lambda tree: json.dumps({**stages, "stages": tree}).encode()
    )
    try:
        put(opened.manifest_path, data.draw(entries))
        put(opened.trash / "20261127-120000-label" / "entry.json", data.draw(damaged_json(stages["stages"]["label"])))
        put(opened.work / "digests.json", data.draw(damaged_json({"a": [1, 2, "x"]})))
        one_line_or_accepted(lambda: standings(config, opened))
        one_line_or_accepted(lambda: opened.open(config))
        one_line_or_accepted(lambda: list(plan(config, opened)))
        one_line_or_accepted(lambda: require_leave(config, opened, ["label"], []))
        one_line_or_accepted(lambda: _drawable(read_run(config, opened)))
    finally:
        put(opened.manifest_path, good)


@fuzzed(150)
@given(data=st.data())
def test_the_vote_store(folder: Path, data: st.DataObject) -> None:
    good = folder / "good.sqlite"
    if not good.exists():
        store = VoteStore(good)
        store.add([(b"q", b"t", Answer([-0.1, -2.3], 3, 0.1, "r"))], [("r", b"q", "a", "why")])
        store.close()
    file = put(folder / "votes.sqlite", data.draw(damaged(good.read_bytes())))

    def use() -> None:
        store = VoteStore(file)
        try:
            store.answers([b"q"])
            store.failures("r", [b"q"])
            store.add([(b"p", b"t", Answer([-0.1, -2.3], 3, 0.1, "r"))])
        finally:
            store.close()

    one_line_or_accepted(use)


@fuzzed(150)
@given(bias=damaged_json({"a": [-0.5, -0.9]}), run=damaged_json({"run": "0123"}))
def test_calibration_and_name_of_a_run(folder: Path, bias: bytes, run: bytes) -> None:
    one_line_or_accepted(lambda: _known_bias(put(folder / "bias.json", bias), 2))
    one_line_or_accepted(lambda: _run_id(put(folder / "run.json", run)))


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    home = folder / "model"
    base().save_pretrained(home)
    words = Tokenizer(WordLevel({"[PAD]": 0, "a": 1}, unk_token="[PAD]"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]").save_pretrained(home)
    return home


@fuzzed(20)
@given(data=st.data())
def test_the_model(model: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]))
    good = (model / name).read_bytes()
    settings = ModelConfig(path=str(model), dtype="float32")
    try:
        content = damaged_json(json.loads(good)) if name.endswith("json") else damaged(good)
        put(model / name, data.draw(content))
        one_line_or_accepted(lambda: load_base(settings, str(model), on=torch.device("cpu")))
        one_line_or_accepted(lambda: load_tokenizer(str(model), settings))
    finally:
        put(model / name, good)


def test_a_misspelt_hub_name_offline_is_one_line_that_names_it() -> None:
    settings = ModelConfig(path="Qwenn/Qwen2.5-0.5B")
    for load in (lambda: load_base(settings, settings.path), lambda: load_tokenizer(settings.path, settings)):
        with pytest.raises(UserError, match=r"^model 'Qwenn/Qwen2\.5-0\.5B': cannot be loaded") as refused:
            load()
        assert len(str(refused.value).splitlines()) == 1


def test_write_json_takes_any_text(tmp_path: Path) -> None:
    write_json(tmp_path / "any.json", {"half \ud83d": "a\u2028b"})
    assert json.loads((tmp_path / "any.json").read_text()) == {"half \ud83d": "a\u2028b"}
