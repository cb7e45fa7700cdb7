"""The matrix of stages and tested faults, from the tests' marks: `python -m tests.chaos_table` writes it into
`docs/chaos.md`.

Only marks above a module's function are read, without running the file; `tests/chaos.py` refuses others.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "chaos.md"
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"
STAGES = ("label", "score", "sft", "grpo", "evaluate", "serve")
FAULTS = (
    *("worker", "coordinator", "Serve replica", "engine child", "reward process", "driver"),
    *("driver, other machine", "node", "network cut and healed", "head", "full disk", "out of memory", "slow disk"),
    *("clock jump", "cluster"),
)
"""What dies or breaks."""
RUN = ("label", "score", "sft", "grpo", "evaluate")
ONLY = {
    "worker": (("label", "score", "sft", "grpo"), "the actors of `evaluate` and `serve` are engines and replicas"),
    "coordinator": (("grpo",), "the others have none"),
    "Serve replica": (("label", "serve"), "Ray Serve hosts teachers and what `serve` serves, and nothing else"),
    "engine child": (("label", "grpo", "evaluate", "serve"), "`score` and `sft` have no engine"),
    "reward process": (("grpo",), "the others compute no rewards"),
    "driver, other machine": (RUN, "`serve` has no work that another machine could go on with"),
    "full disk": (RUN, "`serve` writes nothing to the run directory"),
    "slow disk": (RUN, "`serve` only reads models there, before an engine answers"),
    "cluster": (RUN, "`serve` has no work that another cluster could go on with"),
}
"""The stages that have what a fault breaks, where not all do, and why the others do not."""
MISSING, UNTRIED = "n/a", "–"


class Cell(NamedTuple):
    """A test that puts a stage under a fault."""

    stage: str
    fault: str
    test: str
    command: str
    """Which runs it, every time."""

    @property
    def name(self) -> str:
        """Of the test's function."""
        return self.test.rpartition("::")[2]


def cells() -> Iterator[Cell]:
    """All of them, in the order of files and lines."""
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        yield from cells_of(file, ROOT)


def cells_of(file: Path, root: Path) -> Iterator[Cell]:
    """Those of a file below a root."""
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            for stage, faults, drawn in _marks(node):
                command = "test-cluster" if file.parent.name == "hosts" else "test-chaos" if drawn else "test"
                for fault in faults:
                    yield Cell(stage, fault, f"{file.relative_to(root)}::{node.name}", command)


def _marks(node: ast.FunctionDef) -> Iterator[tuple[str, list[str], bool]]:
    for mark in node.decorator_list:
        if isinstance(mark, ast.Call) and ast.unparse(mark.func) in ("pytest.mark.chaos", "pytest.mark.fault"):
            stage, *faults = (ast.literal_eval(each) for each in mark.args)
            yield stage, faults, ast.unparse(mark.func).endswith("chaos")


def having(fault: str) -> tuple[str, ...]:
    """The stages that have what a fault breaks."""
    return ONLY[fault][0] if fault in ONLY else STAGES


def table(found: list[Cell]) -> str:
    """The matrix, with the numbers of the tests, why some stages lack a part, and the tests."""
    tests = sorted({each.test for each in found})
    lines = [f"| what dies or breaks | {' | '.join(STAGES)} |", f"| --- |{' --- |' * len(STAGES)}"]
    for fault in FAULTS:
        row = [
            " ".join(str(tests.index(each.test) + 1) for each in found if (each.stage, each.fault) == (stage, fault))
            or (UNTRIED if stage in having(fault) else MISSING)
            for stage in STAGES
        ]
        lines.append(f"| {fault} | {' | '.join(row)} |")
    lines += ["", "Why `n/a`:", "", *(f"- {fault}: {why}" for fault, (_, why) in ONLY.items()), ""]
    for number, test in enumerate(tests, start=1):
        command = next(each.command for each in found if each.test == test)
        lines.append(f"{number}. `{test}` (`make {command}`)")
    return "\n".join(lines) + "\n"


def page(text: str, found: list[Cell]) -> str:
    """The page with the table in its place."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{table(found)}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(), list(cells())))
