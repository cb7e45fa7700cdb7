import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import typer.testing

from lorapar_ray.storage.objects import Objects
from lorapar_ray.storage.uris import Uri
from tests.object_store import BUCKET, SCHEMES, object_store

if TYPE_CHECKING:
    from tests.unit.faked_run import Cli

Environment = dict[str, str]
# `CliRunner` would build the same command line from the signatures of its functions before each of hundreds of calls.
typer.testing._get_command = cache(typer.testing._get_command)


@pytest.fixture(autouse=True)
def _no_ray_starts() -> Iterator[None]:
    """Any call of Ray's starts one, which would be there in later tests of this process."""
    yield
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        ray.shutdown()
        pytest.fail("this unit test started a Ray")


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "Cli":
    from tests.unit.faked_run import Cli
    from tests.unit.faked_stages import use_fakes

    use_fakes(monkeypatch)
    return Cli(tmp_path)


@pytest.fixture(scope="session")
def stores() -> Iterator[Callable[[str], Environment]]:
    """The environment of the clients of a scheme's store. Its server, whose imports take seconds, starts at the first
    call and is shared by all tests of this process."""
    running: dict[str, Environment] = {}
    with ExitStack() as stack:

        def environment(scheme: str) -> Environment:
            if scheme not in running:
                running[scheme] = stack.enter_context(object_store(scheme))
            return running[scheme]

        yield environment


@pytest.fixture(scope="module", params=SCHEMES)
def store_scheme(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def store(
    store_scheme: str, stores: Callable[[str], Environment], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Uri:
    """An empty folder of a real bucket, and a machine with an empty cache."""
    for name, value in {**stores(store_scheme), "LORAPAR_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    return Uri(store_scheme, BUCKET, f"runs/{tmp_path.name}")


@pytest.fixture
def objects(store: Uri) -> Objects:
    return Objects(store)
