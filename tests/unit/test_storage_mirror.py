"""A run's copy on a machine: what is pushed and pulled, in which order, and what is left where it breaks
off. The store is a real server, S3's or Google's by its protocol."""

import errno
from pathlib import Path
from typing import Any

import pytest

from lorapar_ray.storage.mirror import Mirror, below
from lorapar_ray.storage.objects import Objects, Stamp
from lorapar_ray.storage.session import RemoteRun
from lorapar_ray.storage.uris import Uri
from lorapar_ray.storage.workspace import Handed, publish, refresh, workspace
from tests.unit.stored import contents, write

pytestmark = pytest.mark.slow  # all share two servers, whose imports take seconds


def test_what_one_machine_pushes_another_pulls(objects: Objects, tmp_path: Path) -> None:
    here, there = Mirror(tmp_path / "here", objects), Mirror(tmp_path / "there", objects)
    write(here.root, a__weights="1", a__config_json="{}", manifest_json="1", lock_json="mine", work__ray__x="of Ray")
    write(here.root, **{"work__votes.sqlite": "a database", "a__.draft": "half"})
    here.push()
    there.pull(lambda _: True)
    assert contents(there.root) == {"a/weights": "1", "a/config.json": "{}", "manifest.json": "1"}
    (here.root / "a" / "weights").unlink()
    write(here.root, b__more="2")
    here.push()
    there.pull(lambda _: True)
    assert contents(there.root) == {"a/config.json": "{}", "b/more": "2", "manifest.json": "1"}
    write(there.root, own="never copied")
    (there.root / "b" / "more").unlink()
    Mirror(there.root, objects).pull(lambda _: True)
    assert contents(there.root) == {"a/config.json": "{}", "manifest.json": "1", "own": "never copied"}
    there.pull(lambda _: True, restore=True)
    assert contents(there.root)["b/more"] == "2"


class Cut(Objects):
    """Fault injection: the machine dies before the `left`-th upload."""

    left = 0

    def upload(self, name: str, file: Path) -> Stamp:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super().upload(name, file)


@pytest.mark.parametrize("uploads", range(4))
def test_a_push_that_is_cut_off_leaves_no_stage_and_no_adapter(uploads: int, objects: Objects, tmp_path: Path) -> None:
    cut = Cut(objects.uri)
    cut.left = uploads
    here = Mirror(tmp_path / "here", cut)
    write(here.root, sft__a_weights="w", **{"sft__adapter_config_json": "{}", "manifest_json": "done"})
    write(here.root, **{"a.jsonl": "log"})
    with pytest.raises(KeyboardInterrupt):
        here.push()
    names = set(objects.listing())
    assert "manifest.json" not in names
    assert "sft/adapter_config.json" not in names or {"sft/a_weights", "a.jsonl"} <= names
    assert "sft/a_weights" not in names or "a.jsonl" in names
    assert len(names) == uploads


def test_a_folder_is_deleted_with_all_below_it_whether_it_is_there_or_not(objects: Objects) -> None:
    for name in ("a/x", "a/b/y", "ab/z"):
        objects.write(name, b"1")
    for folder in ("a", "none"):
        objects.delete_folder(folder)
    assert set(objects.listing()) == {"ab/z"}


def test_two_writes_within_a_second_are_told_apart(store: Uri, tmp_path: Path) -> None:
    here, there = (Mirror(tmp_path / name, Objects(store)) for name in ("here", "there"))
    for number in range(5):
        write(here.root, sums=str(number))
        here.push()
        there.pull(below(["sums"]), look_closely=True)
        assert contents(there.root)["sums"] == str(number)


def test_a_worker_sees_the_run_and_publishes_what_it_may_write(store: Uri, tmp_path: Path) -> None:
    driver = Mirror(tmp_path / "driver", Objects(store))
    write(driver.root, adapter__x="in", trash__old="old", manifest_json="1")
    driver.push()
    handed = Handed(store, str(driver.root), ("work/sft", "metrics"))
    given = {"in": f"{driver.root}/adapter", "base": f"{store}/adapter", "out": [f"{driver.root}/work/sft"], "n": 3}
    with pytest.raises(ValueError, match="killed"), workspace(handed) as rebased:
        found = rebased(given)
        assert found["in"] == found["base"] != given["in"] and found["n"] == 3
        assert (Path(found["in"]) / "x").read_text() == "in" and not (Path(found["in"]).parent / "trash").exists()
        write(Path(found["out"][0]), checkpoint__weights="w")
        write(Path(found["in"]).parent, scores="not to be written")
        with workspace(handed) as other:  # on another machine
            publish()
            second = Path(other(given)["out"][0])
            refresh(str(second))
            assert (second / "checkpoint" / "weights").read_text() == "w"
        raise ValueError("killed")
    driver.pull(below(handed.writes), look_closely=True)
    assert contents(driver.root / "work") == {"sft/checkpoint/weights": "w"}
    assert "scores" not in Objects(store).listing()
    assert not list((tmp_path / "cache" / "workspaces").glob("*/run"))


class Failing:
    """Fault injection: a file, open for reading, on a disk that breaks after 12 MB."""

    def __init__(self, source: Any) -> None:
        self._source, self._left = source, 12 * 2**20

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self._source.close()

    def read(self, size: int) -> bytes:
        if self._left <= 0:
            raise OSError(errno.EIO, "the disk is broken")
        self._left -= size
        return bytes(self._source.read(size))


def test_an_upload_whose_file_cannot_be_read_to_the_end_leaves_no_object(
    objects: Objects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "weights").write_bytes(bytes(20 * 2**20))
    opened = Path.open
    with monkeypatch.context() as patch, pytest.raises(OSError, match="the disk is broken"):
        patch.setattr(Path, "open", lambda self, mode: Failing(opened(self, mode)))
        objects.upload("weights", tmp_path / "weights")
    assert objects.listing() == {}
    assert objects.upload("weights", tmp_path / "weights").size == 20 * 2**20


def test_a_mirror_is_used_again_only_if_nobody_worked_in_between(store: Uri, tmp_path: Path) -> None:
    first, second = (RemoteRun(store, tmp_path / name) for name in ("first", "second"))
    with first.at_work():
        write(first.root, manifest_json="1", scores="1")
    (first.root / "scores").unlink()  # removed by another program
    with first.at_work():
        assert (first.root / "scores").read_text() == "1"
    with pytest.raises(ValueError), first.at_work():
        first.publish = lambda: None  # type: ignore[method-assign]  # the network is cut, and the process dies
        write(first.root, labels="ahead")
        (first.root / "scores").unlink()
        (first.root / ".complete").unlink(missing_ok=True)
        raise ValueError
    (first.root / ".complete").unlink()
    del first.publish
    with first.at_work():  # on the same machine nothing is lost, and removed files stay removed
        assert contents(first.root) == {"manifest.json": "1", "labels": "ahead", "lock.json": ANY(first.root)}
    with second.at_work():
        assert (second.root / "labels").read_text() == "ahead" and not (second.root / "scores").exists()
        write(second.root, labels="newer")
    write(first.root, partition="of a session that others have overtaken")
    with first.at_work():
        assert (first.root / "labels").read_text() == "newer" and not (first.root / "partition").exists()


def ANY(root: Path) -> str:
    return (root / "lock.json").read_text()
