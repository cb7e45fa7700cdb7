"""Every module of the mathematics is in the layers of `make lint`, or listed here as an edge to Ray."""

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
