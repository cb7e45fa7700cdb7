"""Checks that every machine sees the same storage: each writes an answer next to a question, and the asker reads it."""

from __future__ import annotations

import shutil
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from lorapar_ray.errors import UserError
from lorapar_ray.files import cache_root
from lorapar_ray.storage import PROBE
from lorapar_ray.storage.objects import Objects
from lorapar_ray.storage.uris import Uri, place_of
from lorapar_ray.text import one_line

GIB = 2**30


@dataclass(frozen=True)
class Probe:
    """A question in a run directory; travels to the other machines."""

    place: str
    """The run directory's path or URI."""
    name: str = field(default_factory=lambda: f"{PROBE}{uuid.uuid4().hex}")

    def ask(self) -> None:
        """Write the question.

        Raises:
            UserError: the run directory cannot be written to.
        """
        where = place_of(self.place)
        if isinstance(where, Uri):
            objects = Objects(where)
            objects.require_bucket()
            objects.write(self.name, self.name.encode())
            return
        try:
            where.mkdir(parents=True, exist_ok=True)
            (where / self.name).write_text(self.name, encoding="utf-8")
        except OSError as error:
            raise UserError(f"run directory '{where}' cannot be written to ({error.strerror})") from error

    def answer(self, node: str) -> tuple[str, float]:
        """On another machine: read the question and write an answer.

        Returns:
            the reason if that fails, else an empty string; and the free space, in GiB, where a process there keeps its
            files.
        """
        where = place_of(self.place)
        try:
            if isinstance(where, Uri):
                objects = Objects(where)
                found = (objects.read(self.name) or b"").decode(errors="replace")
                objects.write(f"{self.name}-{node}", node.encode())
                own = cache_root()
                own.mkdir(parents=True, exist_ok=True)
            else:
                found = (where / self.name).read_text(encoding="utf-8")
                (where / f"{self.name}-{node}").write_text(node, encoding="utf-8")
                own = where
            return ("" if found == self.name else "reads different content"), shutil.disk_usage(own).free / GIB
        except UserError as error:
            return one_line(error, 200), 0.0
        except OSError as error:
            return one_line(error.strerror or error, 80), 0.0

    def answered(self, node: str) -> bool:
        """Whether a machine's answer is visible here."""
        where = place_of(self.place)
        if isinstance(where, Uri):
            return Objects(where).read(f"{self.name}-{node}") is not None
        return (where / f"{self.name}-{node}").is_file()

    def remove(self) -> None:
        """Delete the question and the answers."""
        where = place_of(self.place)
        if isinstance(where, Uri):
            objects = Objects(where)
            objects.delete(name for name in objects.listing() if name.startswith(self.name))
            return
        for file in Path(where).glob(f"{self.name}*"):
            file.unlink(missing_ok=True)
