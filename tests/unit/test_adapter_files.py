"""Adapter files for engines: their folder, and the removal of a killed engine's files."""

import subprocess
import sys
from pathlib import Path

import pytest

from lorapar_ray.engines import adapter_files
from lorapar_ray.engines.adapter_files import AdapterFiles


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replaces /dev/shm."""
    folder = tmp_path / "shm"
    folder.mkdir()
    monkeypatch.setattr(adapter_files, "SHARED_MEMORY", folder)
    return folder


def test_adapters_are_in_shared_memory_until_they_are_closed(shared: Path) -> None:
    files = AdapterFiles()
    folders = [files.write(content, "{}") for content in (b"first", b"second")]
    assert [(each / "adapter_model.safetensors").read_bytes() for each in folders] == [b"first", b"second"]
    assert all(each.is_relative_to(shared) and (each / "adapter_config.json").read_text() == "{}" for each in folders)
    files.close()
    assert list(shared.iterdir()) == []
    assert files.write(b"third", "{}").is_relative_to(shared)
    files.close()


def test_without_room_there_adapters_are_in_tmpdir(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 9}))
    files = AdapterFiles()
    assert files.write(b"1234", "{}").is_relative_to(shared)
    folder = files.write(b"12345", "{}")
    assert folder.is_relative_to(tmp_path) and not folder.is_relative_to(shared)
    files.close()
    assert list(tmp_path.iterdir()) == [shared] and list(shared.iterdir()) == []


def test_the_next_engine_removes_what_a_killed_one_left(shared: Path) -> None:
    code = (
        "import pathlib, sys\nfrom lorapar_ray.engines import adapter_files\n"
        "adapter_files.SHARED_MEMORY = pathlib.Path(sys.argv[1])\nfiles = adapter_files.AdapterFiles()\n"
        "print(files.write(b'left', '{}'), flush=True)\ninput()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(shared)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        left = Path(process.stdout.readline().strip())
        files = AdapterFiles()
        files.write(b"own", "{}")
        assert left.is_dir(), "of a process that lives"
        files.close()
        process.kill()
    files.write(b"own", "{}")
    assert not left.exists() and len(list(shared.iterdir())) == 1
    files.close()
