"""Adapters as files for vLLM, which reads adapters from folders only."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path

from lorapar_ray.private_directory import private_directory

SHARED_MEMORY = Path("/dev/shm")


class AdapterFiles:
    """Folders with one adapter each, which every process of this machine can map.

    They are in shared memory if there is room, else in `$TMPDIR`. If this process is killed, the next engine on this
    machine removes them.
    """

    def __init__(self) -> None:
        self._open = ExitStack()
        self._directories: dict[Path, Path] = {}

    def write(self, adapter: bytes, config: str) -> Path:
        """Write an adapter; returns its folder.

        Args:
            adapter: content of `adapter_model.safetensors`.
            config: content of `adapter_config.json`.
        """
        folder = self.folder(len(adapter))
        (folder / "adapter_model.safetensors").write_bytes(adapter)
        (folder / "adapter_config.json").write_text(config, encoding="utf-8")
        return folder

    def folder(self, size: int) -> Path:
        """A new, empty directory with room for so many bytes."""
        root = _root(size)
        if root not in self._directories:
            self._directories[root] = self._open.enter_context(private_directory(root))
        return Path(tempfile.mkdtemp(dir=self._directories[root]))

    def close(self) -> None:
        """Remove all of them."""
        self._directories.clear()
        self._open.close()


def _root(size: int) -> Path:
    roomy = SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > 2 * size  # 64 MiB in a plain container
    return SHARED_MEMORY if roomy else Path(tempfile.gettempdir())
