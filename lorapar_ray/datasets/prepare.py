"""Write a run's questions once, train and test disjoint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import count

from lorapar_ray.config import Config, Source
from lorapar_ray.datasets.rows import Lost, MadeUpId, Row, write_rows
from lorapar_ray.datasets.seen import SeenTexts, seen_texts
from lorapar_ray.datasets.sources import read_source
from lorapar_ray.datasets.tables import reject, reject_table
from lorapar_ray.errors import UserError
from lorapar_ray.files import atomic_path
from lorapar_ray.runs import RunDirectory


def prepare(config: Config, run: RunDirectory) -> dict[str, int]:
    """Write `data/train.parquet` and `data/test.parquet`.

    A training row whose prompt is also a test row's, or appeared before, goes to `rejects/prepare.parquet`: a model
    must not be tested on what it was trained on. So does a row that a benchmark published without an answer. Memory
    does not grow with the rows: the set of seen prompts is on disk.

    Returns:
        counts of `train`, `test` and `rejected` rows.

    Raises:
        UserError: see `read_source`; or two rows share an id, or no training row is left.
    """
    with seen_texts(3) as (prompts, *ids), reject_table(run.rejects / "prepare.parquet") as rejects:

        def fresh(part: str, sources: list[Source], ids: SeenTexts) -> Iterator[Row]:
            for index, source in enumerate(sources):
                for row in read_source(source, f"data.{part}[{index}]"):
                    if isinstance(row, Lost):
                        rejects.add(reject(row, "prepare", row.reason))
                        continue
                    row = replace(_own_id(row, ids, f"data.{part}[{index}]", index), system=source.system)
                    if not row.answer.strip():
                        rejects.add(reject(row, "prepare", "no answer in the published data"))
                    elif prompts.add(row.prompt):
                        yield _instructed(row, config.data.instruction)
                    elif part == "test":
                        rejects.add(reject(row, "prepare", "duplicate prompt"))
                    else:
                        rejects.add(reject(row, "prepare", "prompt also in the test rows, or a duplicate"))

        with atomic_path(run.data) as draft:  # the folder appears at once: a source that fails to open leaves no files
            counts: dict[str, int] = {}
            for part, sources, own in (("test", config.data.test, ids[0]), ("train", config.data.train, ids[1])):
                given = any(source.system is not None for source in sources)
                counts[part] = write_rows(draft / f"{part}.parquet", fresh(part, sources, own), systems=given)
            if counts["train"] == 0:
                raise UserError(
                    "data.train: every row is a duplicate or also in data.test; nothing is left to train on"
                )
        counts["rejected"] = rejects.count
    return counts


def _own_id(row: Row, ids: SeenTexts, where: str, source: int) -> Row:
    """The row with a unique id: files of the same name in two folders generate equal ids."""
    if ids.add(row.id):
        return replace(row, id=str(row.id))
    if not isinstance(row.id, MadeUpId):
        raise UserError(f"{where}: id '{row.id}' appears twice; ids must be unique")
    names = (f"{row.id}@{source}" + "'" * more for more in count())
    return replace(row, id=next(name for name in names if ids.add(name)))


def _instructed(row: Row, instruction: str | None) -> Row:
    if instruction is None:
        return row
    messages = row.messages
    if messages:
        last = messages[-1]
        messages = [*messages[:-1], {**last, "content": f"{last['content']}\n{instruction}"}]
    return replace(row, prompt=f"{row.prompt}\n{instruction}", messages=messages)
