"""Runs of a grid that stand as finished, without their work."""

import json

import pyarrow as pa
import pyarrow.parquet as pq

from lorapar_ray.ablations.units import Unit
from lorapar_ray.files import write_json
from lorapar_ray.manifest import FORMAT
from lorapar_ray.pipeline import PIPELINE
from lorapar_ray.standing import inputs_of


def record_finished(unit: Unit) -> None:
    """As if every stage had run with the unit's settings; the files are the caller's."""
    if not unit.run.manifest():  # the files may be there already
        write_json(unit.run.manifest_path, {"format": FORMAT, "identity": {}, "stages": {}})
    for name in unit.stages:
        entries = unit.run.manifest()["stages"]
        inputs = inputs_of(PIPELINE[name], unit.config, entries, unit.run.fingerprints)
        unit.run.record(name, status="done", inputs=inputs, outputs=f"of {name}")


def finish_skills(unit: Unit, answers: dict[str, tuple[int, int]], times: int = 1) -> None:
    """An evaluated run: for each stage the right answers of 100 sums and of 100 riddles, each so many times."""
    run = unit.run
    for folder in (run.labels, run.eval):
        folder.mkdir(parents=True, exist_ok=True)
    labels = {"task": ["sum"] * 5 + ["riddle"] * 5, "system": [1, 1, 1, 2, 1, 2, 2, 1, 2, 2]}
    pq.write_table(pa.table(labels), run.labels / "part-00000.parquet")
    for stage, right in answers.items():
        rows = [
            (f"{task}{n}", task, n < count * times)
            for task, count in zip(("sum", "riddle"), right, strict=True)
            for n in range(100 * times)
        ]
        table = {"id": [r[0] for r in rows], "task": [r[1] for r in rows], "right": [r[2] for r in rows]}
        pq.write_table(pa.table(table), run.eval / f"{stage}.parquet")
        (run.eval / f"{stage}.json").write_text("{}")


def finish_sequence(unit: Unit, answers: dict[str, tuple[int, ...]], times: int = 1) -> None:
    """An evaluated run: for each model the right answers of 100 test rows of each System, each so many times; and a row
    of none."""
    run = unit.run
    ids = [(f"{system}-{n}", system, n) for system in (1, 2, 3) for n in range(100 * times)]
    for folder in (run.data, run.eval, run.partition):
        folder.mkdir(parents=True, exist_ok=True)
    table = {"id": ["other", *(row for row, _, _ in ids)], "system": [None, *(system for _, system, _ in ids)]}
    pq.write_table(pa.table(table), run.data / "test.parquet")
    for name, right in answers.items():
        found = {"id": table["id"], "right": [True, *(n < times * right[system - 1] for _, system, n in ids)]}
        pq.write_table(pa.table(found), run.eval / f"{name}.parquet")
        (run.eval / f"{name}.json").write_text("{}")
    regions = {str(system): {"share": 0.1 * system} for system in (1, 2, 3)}
    jaccard = {"across": 0.4, "system1": 0.6, "system2": 0.7}
    cut = {"theta": unit.config.partition.theta, "systems": regions, "jaccard": {"1-2": 0.51}}
    (run.partition / "systems.json").write_text(json.dumps(cut | {"control": {"1-2": {"jaccard": jaccard}}}))
