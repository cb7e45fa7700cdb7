"""Commands on a run in an object store; `tests/e2e/test_object_store.py` runs the whole pipeline there."""

import http.server
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from lorapar_ray.config_file import load_config
from lorapar_ray.errors import UserError
from lorapar_ray.runs import RunDirectory, looked_at
from lorapar_ray.storage.objects import Objects
from lorapar_ray.storage.probe import Probe
from lorapar_ray.storage.session import RemoteRun
from lorapar_ray.storage.uris import Uri
from tests.tiny_run import lorapar_here, tiny_config, write_config

pytestmark = pytest.mark.slow  # all share two servers, whose imports take seconds


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


@pytest.mark.parametrize("store_scheme", ["s3"], indirect=True)
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
