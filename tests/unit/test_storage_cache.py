"""Objects that a machine keeps: each is read once, whole, and under its own name."""

import errno
import fcntl
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lorapar_ray.errors import UserError
from lorapar_ray.files import cache_root
from lorapar_ray.storage.cache import Cache, on_this_machine
from lorapar_ray.storage.mirror import Mirror
from lorapar_ray.storage.objects import Objects, Stamp
from lorapar_ray.storage.uris import Uri
from tests.unit.stored import contents

pytestmark = pytest.mark.slow  # all share two servers, whose imports take seconds


def test_files_and_folders_of_a_store_are_read_once_on_a_machine(store: Uri, tmp_path: Path) -> None:
    objects = Objects(store)
    objects.write("model/config.json", b"{}")
    objects.write("model/sub/weights.safetensors", b"12")
    folder = on_this_machine(str(store / "model"))
    assert contents(folder) == {"config.json": "{}", "sub/weights.safetensors": "12"}
    assert on_this_machine(str(store / "model")) == folder
    objects.write("model/config.json", b"[]")
    assert (on_this_machine(str(store / "model")) / "config.json").read_text() == "[]"
    assert on_this_machine(str(store / "model/config.json")).read_text() == "[]"
    assert on_this_machine("/some/where") == Path("/some/where")
    with pytest.raises(UserError, match="there is no such object"):
        on_this_machine(str(store / "model/none"))


def test_a_cache_on_a_file_system_without_locks(store: Uri, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    objects, halfway = Objects(store / "model"), threading.Barrier(2)
    objects.write("x", b"12")

    class Slow(Objects):
        def download(self, name: str, file: Path) -> str:
            file.write_bytes(b"1")
            halfway.wait(30)  # both processes write now
            return super().download(name, file)

    with ThreadPoolExecutor(2) as both:
        targets = [tmp_path / "a", tmp_path / "b"]
        tags = list(both.map(lambda target: Cache().fetch(Slow(store / "model"), "x", target), targets))
    assert tags == [objects.tag("x")] * 2 and [target.read_bytes() for target in targets] == [b"12"] * 2
    assert not drafts(cache_root())


class Named(Objects):
    """Fault injection: a store whose listing has more names."""

    more: tuple[str, ...] = ()

    def listing(self, under: str = "") -> dict[str, Stamp]:
        found = super().listing(under)
        stamp = next(iter(found.values()))
        return found | dict.fromkeys(self.more, stamp)

    def download(self, name: str, file: Path) -> str:
        return super().download("config.json", file)

    def tag(self, name: str) -> str:
        return super().tag("config.json")


def test_an_object_s_name_leads_out_of_no_folder(store: Uri, tmp_path: Path) -> None:
    objects = Named(store / "model")
    objects.more = ("../evil", "sub/../../../evil", f"{tmp_path}/evil", "sub//evil", ".git/config")
    objects.write("config.json", b"{}")
    folder = Cache().folder(objects)
    mirror = Mirror(tmp_path / "mirror" / "run", objects)
    mirror.pull(lambda name: True)
    assert contents(folder) == contents(mirror.root) == {"config.json": "{}"}
    assert not list(tmp_path.rglob("*evil*"))


class Halved(Objects):
    """Fault injection: the download of one object ends in its middle."""

    bad = ""

    def download(self, name: str, file: Path) -> str:
        if name == self.bad:
            file.write_bytes(b"1")
            raise UserError("the network is cut")
        return super().download(name, file)


def drafts(folder: Path) -> list[Path]:
    """Unfinished files and folders."""
    return [path for path in folder.rglob(".*") if path.suffix != ".lock"]


def test_a_folder_whose_download_failed_leaves_nothing_behind_and_is_downloaded_again(store: Uri) -> None:
    model, cache = Halved(store / "model"), Cache()
    for name in ("a.safetensors", "b.safetensors"):
        model.write(name, b"12")
    model.bad = "b.safetensors"
    with pytest.raises(UserError, match="the network is cut"):
        cache.folder(model)
    assert not drafts(cache_root())
    model.bad = ""
    assert contents(cache.folder(model)) == {"a.safetensors": "12", "b.safetensors": "12"}
    assert not drafts(cache_root())


@pytest.mark.parametrize("cached", [True, False])
def test_a_pull_that_fails_leaves_no_half_file(cached: bool, store: Uri, tmp_path: Path) -> None:
    objects = Halved(store)
    for name in ("a/x", "a/y"):
        objects.write(name, b"12")
    objects.bad = "a/y"
    mirror = Mirror(tmp_path / "mirror", objects, Cache() if cached else None)
    with pytest.raises(UserError, match="the network is cut"):
        mirror.pull(lambda _: True)
    assert not drafts(tmp_path) and not (mirror.root / "a" / "y").exists()


class Overtaken(Objects):
    """Fault injection: another machine replaces an object just after its tag was read."""

    content = b""

    def tag(self, name: str) -> str:
        found = super().tag(name)
        if self.content:
            self.write(name, self.content)
            self.content = b""
        return found


def test_an_object_that_is_replaced_meanwhile_is_kept_under_its_own_tag(store: Uri, tmp_path: Path) -> None:
    objects, cache = Overtaken(store / "model"), Cache()

    def written(first: bytes, then: bytes = b"") -> Objects:
        objects.write("x", first)
        objects.content = then
        return objects

    assert cache.fetch(written(b"old", b"newer"), "x", tmp_path / "1") == objects.tag("x")
    assert (tmp_path / "1").read_bytes() == b"newer"
    cache.fetch(written(b"old"), "x", tmp_path / "2")  # S3 gives equal contents the same tag
    assert (tmp_path / "2").read_bytes() == b"old"
    assert cache.file(written(b"one", b"other"), "x").read_bytes() == b"other"
    assert contents(cache.folder(written(b"first", b"second"))) == {"x": "second"}
    assert contents(cache.folder(written(b"first"))) == {"x": "first"}
