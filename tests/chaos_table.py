"""The matrix of stages and tested faults, from the tests' marks: `python -m tests.chaos_table` writes it into
`docs/chaos.md`."""

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
    "clock jump",
)
"""What dies or breaks."""
ONLY = {
    "worker": ("label", "score", "sft", "grpo"),
    "coordinator": ("grpo",),
    "Serve replica": ("label", "serve"),
    "engine child": ("label", "grpo", "evaluate", "serve"),
    "reward process": ("grpo",),
    "driver, other machine": ("label", "score", "sft", "grpo", "evaluate"),
    "full disk": ("label", "score", "sft", "grpo", "evaluate"),
    "slow disk": ("label", "score", "sft", "grpo", "evaluate"),
}
"""The stages that have what a fault breaks, where not all do: an evaluation's only actors are its engines, and `serve`
writes no files."""
MISSING, UNTRIED = "n/a", "–"


class Cell(NamedTuple):
    """A test that puts a stage under a fault."""

    stage: str
    fault: str
    test: str
    command: str
    """Which runs it, every time."""


def cells() -> Iterator[Cell]:
    """All of them, in the order of files and lines."""
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef):
                for stage, faults, drawn in _marks(node):
                    command = "test-cluster" if file.parent.name == "hosts" else "test-chaos" if drawn else "test"
                    for fault in faults:
                        yield Cell(stage, fault, f"{file.relative_to(ROOT)}::{node.name}", command)


def _marks(node: ast.FunctionDef) -> Iterator[tuple[str, list[str], bool]]:
    for mark in node.decorator_list:
        if isinstance(mark, ast.Call) and ast.unparse(mark.func) in ("pytest.mark.chaos", "pytest.mark.fault"):
            stage, *faults = (ast.literal_eval(each) for each in mark.args)
            yield stage, faults, ast.unparse(mark.func).endswith("chaos")


def table(found: list[Cell]) -> str:
    """The matrix, with the numbers of the tests, and the tests."""
    tests = sorted({each.test for each in found})
    lines = [f"| what dies or breaks | {' | '.join(STAGES)} |", f"| --- |{' --- |' * len(STAGES)}"]
    for fault in FAULTS:
        row = [
            " ".join(str(tests.index(each.test) + 1) for each in found if (each.stage, each.fault) == (stage, fault))
            or (UNTRIED if stage in ONLY.get(fault, STAGES) else MISSING)
            for stage in STAGES
        ]
        lines.append(f"| {fault} | {' | '.join(row)} |")
    lines.append("")
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
