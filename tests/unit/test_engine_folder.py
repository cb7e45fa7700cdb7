"""Where an engine's temporary files lie, and how long."""

import os
import stat
import tempfile
from pathlib import Path

import pytest

from lorapar_ray.engines.folder import LONGEST_ROOT, engine_folder, sockets_in
from lorapar_ray.ray_files import ENGINE_FILES


def test_an_engine_has_a_private_directory_for_its_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = Path(tempfile.mkdtemp(dir="/tmp"))
    monkeypatch.setenv(ENGINE_FILES, str(short))
    with engine_folder() as folder, engine_folder() as other:
        assert folder != other and folder.parent == other.parent == short
        assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IRWXU
        with sockets_in(folder):
            assert os.environ[ENGINE_FILES] == str(folder)
        assert os.environ[ENGINE_FILES] == str(short)
    short.rmdir()  # nothing is left in it


def test_a_directory_with_a_long_path_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("job." + "4711" * 20)
    long.mkdir()
    monkeypatch.delenv(ENGINE_FILES, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with engine_folder() as folder, sockets_in(folder):
        assert len(os.fsencode(folder.parent)) <= LONGEST_ROOT
        assert not list(long.iterdir())
    assert ENGINE_FILES not in os.environ
