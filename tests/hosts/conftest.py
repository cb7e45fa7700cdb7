from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from lorapar_ray.threads import meanwhile
from tests.hosts.machines import Machine, why_not
from tests.hosts.run import Sent, write_sent
from tests.hosts.topology import topology
from tests.tiny_run import save_tiny_student


class FarRun(NamedTuple):
    """The whole pipeline, undisturbed."""

    run: Path
    status: int
    output: str
    titles: Mapping[str, set[str]]
    """Of the Ray processes that each machine had."""


@pytest.fixture(scope="session")
def sent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sent]:
    """A cluster over machines and a client of it; this tier needs what a plain user, or a container, does not have."""
    if reason := why_not():
        pytest.skip(f"no machines inside this one: {reason}")
    root = tmp_path_factory.mktemp("machines")
    save_tiny_student(root / "shared" / "student")
    with topology(root) as cluster:
        yield Sent(cluster, write_sent(root / "client" / "sent"), root / "shared")


@pytest.fixture(scope="session")
def far(sent: Sent) -> FarRun:
    """Made once; whoever changes it works on a copy."""
    with seen_processes(sent.cluster.on) as titles:
        job = sent.submit("runs/tiny")
        output, _ = job.communicate(timeout=900)
    return FarRun(sent.shared / "runs" / "tiny", job.returncode, output, titles)


@contextmanager
def seen_processes(on: Mapping[str, Machine]) -> Iterator[dict[str, set[str]]]:
    """Titles of the Ray processes that each machine has while the block runs."""
    titles: dict[str, set[str]] = defaultdict(set)

    def look() -> None:
        for name, machine in on.items():
            titles[name] |= {each for each in machine.processes().values() if each.startswith("ray::")}

    with meanwhile(look, every_s=0.5):
        yield titles
