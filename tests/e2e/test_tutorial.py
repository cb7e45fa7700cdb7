"""The commands of the tutorial, in the order of the page, on the tiny student."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_run import ROOT, save_tiny_student
from tests.unit.test_tutorial import FILE

pytestmark = pytest.mark.e2e
PAGE = (ROOT / "docs" / "tutorial.md").read_text()
COMMANDS = re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
RUN = COMMANDS.index("lorapar run mine.yaml\n")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The page's files, with the tiny student instead of the page's model."""
    student = save_tiny_student(tmp_path / "student")
    for name, text in FILE.findall(PAGE):
        (tmp_path / name).write_text(text.replace("package:smollm2-135m-instruct", str(student)))
    return tmp_path


def typed(commands: list[str], folder: Path) -> str:
    """What a shell prints that gets the commands; each must succeed."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"PATH": path}
    script = ["bash", "-euo", "pipefail", "-c", "".join(commands)]
    done = subprocess.run(script, cwd=folder, env=environment, capture_output=True, text=True, timeout=1000)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_what_comes_before_the_run(folder: Path) -> None:
    assert 0 < RUN < len(COMMANDS) - 1
    said = typed(COMMANDS[:RUN], folder)
    assert "grpo       will run" in said and not (folder / "runs").exists()


@pytest.mark.long
def test_every_command_in_order(folder: Path) -> None:
    said = typed(COMMANDS, folder)
    assert "θ 0.5:" in said and "θ 0.9:" in said
    assert "grpo.learning_rate 0.0003 → 0.0001" in said and "replaces grpo (" in said
    assert (folder / "runs" / "mine" / "report" / "index.html").is_file()
