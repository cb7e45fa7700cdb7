"""A run directory in an object store: what is copied, in which order, and by which command. The store is a real server,
S3's or Google's by its protocol; `tests/e2e/test_object_store.py` runs the whole pipeline."""

import errno
import http.server
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from lorapar_ray import run_lock
from lorapar_ray.config_file import load_config
from lorapar_ray.errors import UserError
from lorapar_ray.files import cache_root
from lorapar_ray.runs import RunDirectory, looked_at
from lorapar_ray.storage import claims
from lorapar_ray.storage.cache import Cache, on_this_machine
from lorapar_ray.storage.claims import Claim
from lorapar_ray.storage.mirror import Mirror, below
from lorapar_ray.storage.objects import AT_ONCE, Objects, Stamp
from lorapar_ray.storage.probe import Probe
from lorapar_ray.storage.session import RemoteRun
from lorapar_ray.storage.uris import Uri, place_of
from lorapar_ray.storage.workspace import Handed, publish, refresh, workspace
from tests.object_store import BUCKET, SCHEMES, object_store
from tests.tiny_run import lorapar_here, tiny_config, write_config

pytestmark = pytest.mark.slow  # all share two servers, whose imports take seconds
RUN = Uri("s3", "bucket", "runs/x")


@pytest.fixture(scope="module", params=SCHEMES)
def server(request: pytest.FixtureRequest) -> Iterator[tuple[str, dict[str, str]]]:
    """A store's scheme, and the environment of its clients."""
    with object_store(request.param) as environment:
        yield request.param, environment


@pytest.fixture
def store(server: tuple[str, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Uri:
    """An empty folder of a real bucket, and a machine with an empty cache."""
    scheme, environment = server
    for name, value in {**environment, "LORAPAR_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    return Uri(scheme, BUCKET, f"runs/{tmp_path.name}")


@pytest.fixture
def objects(store: Uri) -> Objects:
    return Objects(store)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("runs/x", Path("runs/x")),
        ("/a:/b", Path("/a:/b")),
        ("file:///shared/a%20b", Path("/shared/a b")),
        ("s3://bucket/runs/x/", RUN),
        ("S3://bucket/runs/x", RUN),
        ("gs://b/r", Uri("gs", "b", "r")),
        ("https://host/x", "no such storage here; give a path, or s3://, gs:// or file://"),
        ("s3://bucket", "write s3://BUCKET/FOLDER"),
        ("s3:///x", "write s3://BUCKET/FOLDER"),
        ("s3://bucket/a/../b", "write s3://BUCKET/FOLDER"),
        ("s3://KEY:SECRET@bucket/x", "credentials and options belong in the environment"),
        ("s3://bucket/x?endpoint_override=h", "credentials and options belong in the environment"),
        ("file://host/x", "write file:///FOLDER"),
    ],
)
def test_a_place_is_a_path_a_uri_or_refused(given: str, found: Any) -> None:
    if isinstance(found, str):
        with pytest.raises(UserError, match="--run-dir") as refused:
            place_of(given)
        assert found in str(refused.value) and "SECRET" not in str(refused.value)
    else:
        assert place_of(given) == found


def write(root: Path, **files: str) -> None:
    for name, content in files.items():
        path = root / name.replace("__", "/").replace("_json", ".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def contents(root: Path) -> dict[str, str]:
    files = (path for path in root.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {str(path.relative_to(root)): path.read_text() for path in files}


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


@pytest.fixture
def config(tmp_path: Path) -> Path:
    tree = tiny_config(tmp_path / "student") | {"label": {"strategy": "random"}}
    return write_config(tmp_path / "tiny.yaml", tree)


def test_a_stage_s_results_are_in_the_store_and_another_machine_goes_on(
    store: Uri, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = lorapar_here("label", "-c", config, "-d", tmp_path / "local")
    first = lorapar_here("label", "-c", config, "-d", store)
    assert (local.returncode, first.returncode) == (0, 0), first.stderr
    assert set(Objects(store).listing()) - {".session"} == {
        name for name in contents_of_a_run(tmp_path / "local") if name not in ("work/digests.json", "lock.json")
    }
    monkeypatch.setenv("LORAPAR_CACHE", str(tmp_path / "another machine"))
    again = lorapar_here("label", "-c", config, "-d", store)
    assert again.returncode == 0 and f"everything is done in '{store}'; nothing to do" in again.stdout
    shown = lorapar_here("status", "-d", store, "--once")
    assert shown.stdout.startswith(f"tiny · {store} · no command is running") and "✓ label" in shown.stdout
    with looked_at(str(store)) as run:
        assert (
            contents_of_a_run(run.root)["labels/part-00000.parquet"]
            == (tmp_path / "local" / "labels" / "part-00000.parquet").read_bytes()
        )
    assert not any(b"secret" in content for content in contents_of_a_run(tmp_path / "another machine").values())


def contents_of_a_run(root: Path) -> dict[str, bytes]:
    files = (path for path in root.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


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


def test_a_second_command_on_the_same_run_names_the_first(store: Uri, config: Path, tmp_path: Path) -> None:
    with RemoteRun(store, tmp_path / "another machine's").at_work():
        refused = lorapar_here("label", "-c", config, "-d", store)
    assert refused.returncode == 2 and f"'{store}' is in use by process {os.getpid()}" in refused.stderr
    objects = Objects(store)
    objects.write("somebody/elses", b"data")
    foreign = lorapar_here("label", "-c", config, "-d", store)
    assert f"run directory '{store}' is not empty and holds no manifest.json; choose another" in foreign.stderr


def test_what_a_killed_check_leaves_is_no_users_file(store: Uri, config: Path, tmp_path: Path) -> None:
    probe = Probe(str(store))
    probe.ask()
    assert probe.answer("node")[0] == ""
    run = RunDirectory(str(store), RemoteRun(store, tmp_path / "mirror"))
    with run.at_work(load_config(config)):
        assert run.manifest()["identity"]


class Refusing(http.server.BaseHTTPRequestHandler):
    """Fault injection: an S3 server that answers every request with one error."""

    code, status = "", 403

    def do_GET(self) -> None:
        body = f"<Error><Code>{self.code}</Code><Message>no</Message></Error>".encode()
        self.send_response(self.status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)

    do_PUT = do_POST = do_HEAD = do_DELETE = do_GET

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize("server", ["s3"], indirect=True)
@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("AccessDenied", "no permission; check AWS_ACCESS_KEY_ID"),
        ("RequestTimeTooSkewed", "this machine's clock is wrong; set it"),
        ("InvalidAccessKeyId", "the credentials are not accepted; check AWS_ACCESS_KEY_ID"),
    ],
)
def test_a_store_that_refuses_is_one_line(
    code: str, said: str, store: Uri, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = type("Handler", (Refusing,), {"code": code})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as refusing:
        monkeypatch.setattr(refusing, "handle_error", lambda *_: None)  # of a client that has left
        threading.Thread(target=refusing.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{refusing.server_port}")
        refused = lorapar_here("label", "-c", config, "-d", store)
        refusing.shutdown()
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1 and said in refused.stderr
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in refused.stderr


def test_a_bucket_or_a_store_that_is_not_there_is_one_line(
    store: Uri, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = f"{store.scheme}://nowhere/runs/x"
    for place, said in ((nowhere, "there is no such bucket"), ("hdfs://n/x", "no such storage here")):
        refused = lorapar_here("label", "-c", config, "-d", place)
        assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1 and said in refused.stderr
    endpoint = {"s3": "AWS_ENDPOINT_URL", "gs": "STORAGE_EMULATOR_HOST"}[store.scheme]
    monkeypatch.setenv(endpoint, "127.0.0.1:1")
    refused = lorapar_here("status", "-d", store)
    assert refused.stderr == f"lorapar: {endpoint}=127.0.0.1:1: write http://HOST:PORT or https://HOST\n"


@pytest.mark.parametrize("command", [("status",), ("export", "-o", "taken"), ("serve",)])
def test_a_run_that_is_not_in_the_store_is_one_line(command: tuple[str, ...], store: Uri) -> None:
    refused = lorapar_here(*command, "-d", str(store))
    assert refused.returncode == 2
    assert refused.stderr == f"lorapar: run directory '{store}' holds no run (no manifest.json)\n"


def test_what_is_taken_out_of_a_run_goes_to_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for command in (["export", "-d", "run"], ["evaluate", "--model", "m"], ["ablate", "mask", "run.yaml"]):
        refused = lorapar_here(*command, "-o", "s3://bucket/out")
        assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1
        assert "--out s3://bucket/out: " in refused.stderr and "give a path" in refused.stderr
    assert not [*tmp_path.iterdir()]


def test_the_machines_of_a_cluster_find_each_other_s_files_in_a_bucket(store: Uri) -> None:
    probe = Probe(str(store))
    probe.ask()
    why, free_gib = probe.answer("a")
    assert why == "" and free_gib > 0 and probe.answered("a") and not probe.answered("b")
    assert Probe(str(store)).answer("b")[0] == "reads different content"
    probe.remove()
    assert not [name for name in Objects(store).listing() if name.startswith(probe.name)]
    with pytest.raises(UserError, match=f"'{store.scheme}://nowhere/x': there is no such bucket"):
        Probe(f"{store.scheme}://nowhere/x").ask()


def test_a_run_on_a_disk_is_as_it_was(tmp_path: Path) -> None:
    run = RunDirectory(f"file://{tmp_path}/run")
    assert run.root == tmp_path / "run" and run.remote is None and run.place == str(run.root)
    assert run.address(run.adapter) == str(tmp_path / "run" / "adapter")
    with run.shared(run.sft) as handed:
        assert handed is None
