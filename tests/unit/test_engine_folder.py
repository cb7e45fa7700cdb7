"""Where the temporary files of a process's engines lie, and how long."""

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from lorapar_ray.engines import folder
from lorapar_ray.engines.folder import LONGEST_ROOT, engine_folder, sockets_in
from lorapar_ray.ray_files import ENGINE_FILES


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[ExitStack]:
    """A process that has no folder yet; closing it is the end of the process."""
    with ExitStack() as stack:
        monkeypatch.setattr(folder, "_open", stack)
        engine_folder.cache_clear()
        yield stack
    engine_folder.cache_clear()


def test_engines_have_a_private_directory_for_their_sockets(ends: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        monkeypatch.setenv(ENGINE_FILES, short)
        own = engine_folder()
        assert own.parent == Path(short) and engine_folder() == own
        assert stat.S_IMODE(own.stat().st_mode) == stat.S_IRWXU
        with sockets_in(own):
            assert os.environ[ENGINE_FILES] == str(own)
        assert os.environ[ENGINE_FILES] == short
        ends.close()
        assert not list(Path(short).iterdir())


def test_a_directory_with_a_long_path_is_not_used(
    ends: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("job." + "4711" * 20)
    long.mkdir()
    monkeypatch.delenv(ENGINE_FILES, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    own = engine_folder()
    with sockets_in(own):
        assert len(os.fsencode(own.parent)) <= LONGEST_ROOT
        assert not list(long.iterdir())
    assert ENGINE_FILES not in os.environ
    shutil.rmtree(own)
