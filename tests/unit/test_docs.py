"""The documentation matches the code: messages, commands, diagram, fields."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import typer

from lorapar_ray.cli import app
from lorapar_ray.config import Config
from lorapar_ray.config_file import load_config
from lorapar_ray.pipeline import STAGES

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMANDS = typer.main.get_command(app)
COMMANDS_OF_JOBS = {"pipeline": "run", **{stage: stage for stage in STAGES}}
"""The command of each script that Ray runs as a job (`jobs/entry.py`)."""


def commands(page: Path) -> list[str]:
    """The `lorapar` commands that have their own line, with continuation lines joined."""
    text = page.read_text().replace("\\\n", " ")
    return [line.strip() for line in text.splitlines() if re.match(r"(    |)(lorapar) [a-z]", line)]


def test_no_help_text_has_brackets_which_its_formatter_would_take_out() -> None:
    options = [(name, each) for name, command in COMMANDS.commands.items() for each in command.params]  # type: ignore[attr-defined]
    assert len(options) > 50
    assert [
        f"{name} {each.name}: {each.help}" for name, each in options if "[" in (getattr(each, "help", "") or "")
    ] == []


def test_no_page_or_setting_has_the_marks_of_a_merge() -> None:
    folders = [ROOT / name for name in ("cluster", "docs", "jobs", "requirements")]
    files = [
        *PAGES,
        *(file for folder in folders for file in folder.rglob("*") if file.suffix in (".md", ".yaml", ".txt")),
    ]
    assert len(files) > 30
    assert [file for file in files if re.search(r"^(<{7}|>{7}) ", file.read_text(), re.MULTILINE)] == []


def test_there_are_commands_to_check() -> None:
    assert sum(len(commands(page)) for page in PAGES) > 8


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_is_one_that_lorapar_takes(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for line in commands(page):
        if "…the same…" in line:
            continue
        words = [word for word in shlex.split(line, comments=True)[1:] if word != "$SET" and "…" not in word]
        command = COMMANDS.commands[words[0]]  # type: ignore[attr-defined]
        with command.make_context(words[0], words[1:]) as context:
            given = context.params
        named = given.get("config") or given.get("config_option") or Path()
        [config] = named if isinstance(named, list | tuple) else [named]
        overrides = [each for each in given.get("set_") or [] if "FOLDER" not in each]
        if config.is_file():
            load_config(config, overrides)


SCRIPTS = [*PAGES, ROOT / "cluster" / "README.md", ROOT / "jobs" / "benchmarks" / "README.md"]


def test_every_script_of_a_page_exists_and_has_its_options() -> None:
    lines = [line for page in SCRIPTS for line in re.findall(r"python (jobs/[^`|\n]*)", page.read_text())]
    assert len(lines) > 8
    for line in lines:
        name, *words = [word for word in shlex.split(line, comments=True) if "…" not in word]
        if name == "jobs/benchmarks/NAME.py":
            continue
        assert (ROOT / name).is_file(), line
        if (ROOT / name).with_suffix("").name in COMMANDS_OF_JOBS:
            command = COMMANDS_OF_JOBS[(ROOT / name).with_suffix("").name]
            with COMMANDS.commands[command].make_context(command, words):  # type: ignore[attr-defined]
                pass
        else:
            known = (ROOT / name).read_text() + (ROOT / "jobs" / "benchmarks" / "_rows.py").read_text()
            assert [word for word in words if word.startswith("--") and f'"{word}"' not in known] == [], line


def test_the_messages_under_troubleshooting_are_those_of_the_code() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    headings = re.findall(r"^\*\*.*?·", page, re.MULTILINE | re.DOTALL)
    quoted = [part for line in headings for text in re.findall(r"`([^`]+)`\*\*", line) for part in text.split(" … ")]
    assert len(quoted) > 15
    code = "".join(path.read_text() for path in (ROOT / "lorapar_ray").rglob("*.py"))
    code = re.sub(r'"\s*\n\s*f?"', "", code).replace("{LOSSES}", "5")
    assert [text for text in quoted if " ".join(text.split()) not in code] == []


def test_the_diagram_has_the_stages_in_order_and_only_places_that_exist() -> None:
    text = (ROOT / "docs" / "architecture.svg").read_text()
    assert tuple(re.findall(r'<text class="b"[^>]*>(\w+)</text><text x="[^"]*" y="136"', text)) == STAGES
    places = set(re.findall(r"\b([a-z0-9_/]+\.py)\b", text))
    assert len(places) > 8 and [each for each in places if not (ROOT / "lorapar_ray" / each).is_file()] == []
    folders = re.findall(r'y="(?:136|264)">([^<]*)/', text)
    folders = [each for line in folders for each in re.findall(r"[a-z]+", line.replace("(vLLM)", ""))]
    assert len(folders) > 12
    assert [each for each in folders if not (ROOT / "lorapar_ray" / each).is_dir()] == []


def test_the_config_reference_has_every_field_with_its_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import hooks

    page = hooks.config_reference()
    for section in set(hooks._sections(Config)):
        _, _, rest = page.partition(f"## {section.__name__}\n")
        table = rest.partition("\n## ")[0]
        assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(section.model_fields)
    cells = [line.split(" | ") for line in page.partition("## Types")[0].splitlines() if line.startswith("| `")]
    assert len(cells) > 200 and [cell[0] for cell in cells if cell[-1].strip("| ") == ""] == []
    assert "| `learning_rate` | `PositiveFloat` | `5.0e-06` | result |" in page
    assert "| `checkpoint_every` | `PositiveInt` | `10` | operation |" in page
    sys.modules.pop("hooks")
