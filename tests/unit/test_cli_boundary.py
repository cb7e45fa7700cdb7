"""Errors end a command with one line and status 2, with any terminal encoding and any disk."""

import errno
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lorapar_ray import cli
from lorapar_ray.datasets.records import read_records
from lorapar_ray.errors import UserError
from lorapar_ray.models import model_reference, resolve_model
from tests.tiny_run import tiny_config, write_config

RUN = "from lorapar_ray.cli import main; main()"


def test_a_terminal_that_is_not_utf_8_shows_escapes(tmp_path: Path) -> None:
    folder = tmp_path / "θ [bold]$x$[/INST]"
    command = [sys.executable, "-c", RUN, "run", str(folder / "config.yaml")]
    done = subprocess.run(command, env={"PYTHONIOENCODING": "ascii", "PATH": ""}, capture_output=True, check=False)
    said = done.stderr.decode("ascii")
    assert done.returncode == 2 and said.count("\n") == 1
    assert "\\u03b8 [bold]$x$[/INST]" in said and "no such file" in said


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.EROFS, "Read-only file system", "/mnt/x"), "'/mnt/x': Read-only file system"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "/" + "x" * 300), "File name too long"),
        (UserError("two\nlines \x1b[2J"), "two lines \\x1b[2J"),
    ],
)
def test_what_is_wrong_with_a_place_is_one_line(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as left:
        cli.main()
    shown = capsys.readouterr().err
    assert left.value.code == 2 and shown.count("\n") == 1 and said in shown


def test_a_defect_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(OSError):
        cli.main()


@pytest.mark.parametrize(
    "use",
    [
        lambda path: model_reference(path),
        lambda path: resolve_model(path),
        lambda path: list(read_records(path, "data.train[0]")),
        lambda path: cli.export([Path("nowhere")], [Path(path)]),
    ],
)
def test_the_home_of_an_unknown_user_is_one_line(use: Callable[[str], object]) -> None:
    with pytest.raises(UserError, match="no such user's home"):
        use("~no-such-user/x")


@pytest.mark.parametrize(
    "command", ["status -d a -d b", "export -d a -d b -o c", "export -d a -o b -o c", "submit c.yaml -d a -d b"]
)
def test_no_option_silently_drops_an_earlier_one(command: str, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yaml", tiny_config(Path("a/b")))
    outcome = CliRunner().invoke(cli.app, command.replace("c.yaml", str(config)).split())
    assert isinstance(outcome.exception, UserError) and "given 2 times" in str(outcome.exception)
