"""One command at a time works on a run in an object store; one that has lost the run writes nothing more."""

import json
import math
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from lorapar_ray import run_lock
from lorapar_ray.errors import UserError
from lorapar_ray.storage import claims
from lorapar_ray.storage.claims import Claim
from lorapar_ray.storage.objects import AT_ONCE, Objects, Stamp
from lorapar_ray.storage.session import RemoteRun
from lorapar_ray.storage.uris import Uri
from tests.unit.stored import write

pytestmark = pytest.mark.slow  # all share two servers, whose imports take seconds


def test_a_second_command_is_refused_by_name_and_may_wait(objects: Objects) -> None:
    with Claim(objects).held():
        with pytest.raises(UserError, match=rf"'{objects.uri}' is in use by process {os.getpid()} on ") as refused:
            Claim(objects)._take_within(0.0)
        assert f"delete '{objects.uri}/lock/" in str(refused.value)
        assert len(objects.listing("lock")) == 1
        found = claims.living_claim(objects)
        assert found is not None and found["pid"] == os.getpid()
    assert not objects.listing("lock") and claims.living_claim(objects) is None


def test_a_command_waits_until_the_first_is_done(objects: Objects, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "RETRY_S", 0.01)
    first = Claim(objects)
    with first.held():
        held = list(objects.listing("lock"))
        threading.Timer(0.05, lambda: objects.delete(held)).start()
        with Claim(objects).held(wait_s=20):
            assert len(objects.listing("lock")) == 1


class Aged(Objects):
    """Fault injection: a claim of some age, by the store's clock."""

    name, age = "lock/old.json", 0.0

    def listing(self, under: str = "") -> dict[str, Stamp]:
        return {
            name: stamp._replace(mtime_ns=stamp.mtime_ns - int(1e9 * self.age * (name == self.name)))
            for name, stamp in super().listing(under).items()
        }


@pytest.mark.parametrize(
    ("holder", "age", "alive"),
    [
        ({"started": 5}, 0, False),  # a process of this machine that has ended
        ({"host": "elsewhere"}, 10, True),
        ({"host": "elsewhere"}, run_lock.STALE_S + 10, False),
    ],
)
def test_a_dead_holder_is_known_by_its_process_here_and_by_the_store_s_clock_elsewhere(
    holder: dict[str, Any], age: float, alive: bool, store: Uri
) -> None:
    objects = Aged(store)
    objects.write(Aged.name, json.dumps(run_lock.identity() | {"holds": True} | holder).encode())
    objects.age = age
    if alive:
        with pytest.raises(UserError, match="in use by process"), Claim(objects).held():
            pass
    else:
        with Claim(objects).held():
            assert Aged.name not in objects.listing()


def test_of_many_that_claim_at_once_one_holds_at_a_time(objects: Objects, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "RETRY_S", 0.005)
    monkeypatch.setattr(claims, "BOTH_S", (0.01, 0.3))
    monkeypatch.setattr(claims, "ROUNDS", 10**6)
    monkeypatch.setattr(claims, "identity", lambda: {**run_lock.identity(), "thread": threading.get_ident()})
    inside, most, done = [0], [0], []

    def command() -> None:
        with Claim(objects).held(wait_s=60):
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0.002)
            inside[0] -= 1
        done.append(1)

    threads = [threading.Thread(target=command) for _ in range(3)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(done) == 3 and most == [1]


def test_a_holder_that_slept_or_was_taken_over_writes_nothing_more(
    objects: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = Claim(objects)
    with claim.held():
        claim.require()
        claim._seen -= claims.FENCE_S + 1
        with pytest.raises(UserError, match="taken over by another command or cut off"):
            claim.require()
    monkeypatch.setattr(claims, "BEAT_S", 0.01)
    with pytest.raises(KeyboardInterrupt), Claim(objects).held():
        for _ in range(2000):  # a beat in progress may write it once more
            objects.delete(objects.listing("lock"))
            time.sleep(0.01)


class Interposed:
    """Fault injection: a store's file system that calls `before` ahead of each upload."""

    def __init__(self, real: Any, before: Callable[[str], None]) -> None:
        self._real, self._before = real, before

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def open_output_stream(self, path: str) -> Any:
        self._before(path)
        return self._real.open_output_stream(path)


@pytest.mark.parametrize("cut", [True, False])
def test_a_command_that_loses_its_run_during_a_push_writes_and_deletes_nothing_more(
    cut: bool, store: Uri, objects: Objects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `cut`, each first try fails, and a second one would succeed, as after minutes without a network."""
    monkeypatch.setattr(claims, "BEAT_S", 1000.0)
    run, begun = RemoteRun(store, tmp_path / "run"), set()

    def lose(path: str) -> None:
        if "part" in path:
            assert run._claim is not None
            run._claim._seen = -math.inf
            again = path in begun
            begun.add(path)
            if cut and not again:
                raise OSError("the network is cut")

    run.objects.file_system = Interposed(run.objects.file_system, lose)
    with pytest.raises(UserError, match="taken over by another command or cut off"), run.at_work():
        write(run.root, old="1", manifest_json="1")
        run.publish()
        objects.write("folder/x", b"another command's")
        (run.root / "old").unlink()
        write(run.root, manifest_json="22", **{f"part{number}": "1" for number in range(3 * AT_ONCE)})
        with suppress(UserError):
            run.publish()
        with suppress(UserError):
            run.remove("folder")
    assert objects.read("old") == objects.read("manifest.json") == b"1" and objects.read("folder/x") is not None
    parts = [name for name in objects.listing() if name.startswith("part")]
    assert len(begun) <= AT_ONCE and len(parts) <= (0 if cut else AT_ONCE)


def test_a_guard_stands_before_every_call(objects: Objects, tmp_path: Path) -> None:
    def refuse() -> None:
        raise UserError("the run is lost")

    objects.write("a/x", b"1")
    before, guarded = objects.listing(), objects.guarded(refuse)
    write(tmp_path, file="1")
    calls: list[Callable[[], object]] = [
        lambda: guarded.write("b", b"1"),
        lambda: guarded.upload("b", tmp_path / "file"),
        lambda: guarded.delete(["a/x"]),
        lambda: guarded.delete_folder("a"),
        lambda: guarded.read("a/x"),
    ]
    for call in calls:
        with pytest.raises(UserError, match="the run is lost"):
            call()
    assert objects.listing() == before
