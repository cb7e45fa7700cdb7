"""Every module of the mathematics is in the layers of `make lint`, or listed here as an edge to Ray."""

import ast
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
EDGES = {"job", "stage", "worker", "units", "distributed", "__init__"}
"""Files of these folders that put the mathematics on Ray or read the config."""


def test_every_file_of_mathematics_is_in_the_layers() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    held = set(contracts[0]["source_modules"])
    for folder in ("adapters", "importance", "partition"):
        files = {path.stem for path in (ROOT / "lorapar_ray" / folder).glob("*.py")} - EDGES
        assert files == {name.rpartition(".")[2] for name in held if name.startswith(f"lorapar_ray.{folder}.")}


TEXT = {"read_text", "write_text", "open"}
NO_TEXT = {"os", "run", "self", "unit.run"}
"""What has an `open` that does not open a text file."""


def test_every_text_file_is_utf_8_whatever_the_machine_s_locale_is() -> None:
    """Ruff's PLW1514 is a preview, and knows only paths that are annotated as such."""
    found = []
    for file in (ROOT / "lorapar_ray").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or any(keyword.arg == "encoding" for keyword in node.keywords):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            owner = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
            modes = [each.value for each in node.args if isinstance(each, ast.Constant) and isinstance(each.value, str)]
            binary = any("b" in mode for mode in modes if set(mode) <= set("rwxab+"))
            if name in TEXT and not binary and not (name == "open" and owner in NO_TEXT):
                found.append(f"{file.relative_to(ROOT)}:{node.lineno} {ast.unparse(node)[:80]}")
    assert found == []
