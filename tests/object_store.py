"""An object store on this machine, S3's or Google's, and the environment for its clients."""

import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tests.ports import free_port
from tests.waiting import wait_until

BUCKET = "bucket"
SCHEMES = ("s3", "gs")
KEYS = {
    "AWS_ACCESS_KEY_ID": "AKIATESTTESTTEST",
    "AWS_SECRET_ACCESS_KEY": "a-secret-of-this-test",
    "AWS_REGION": "us-east-1",
}
START_LIMIT_S = 60


@contextmanager
def object_store(scheme: str = "s3") -> Iterator[dict[str, str]]:
    """A bucket while the block runs; yields its clients' environment."""
    with _s3() if scheme == "s3" else _gs() as environment:
        yield environment


@contextmanager
def _s3() -> Iterator[dict[str, str]]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        url = f"http://{host}:{port}"
        urllib.request.urlopen(urllib.request.Request(f"{url}/{BUCKET}", method="PUT")).close()
        yield {"AWS_ENDPOINT_URL": url, **KEYS}
    finally:
        server.stop()


@contextmanager
def _gs() -> Iterator[dict[str, str]]:
    """In a process of its own: a call of pyarrow's that keeps the GIL could not be answered by a thread of this one."""
    port = free_port()
    where = ("--host=127.0.0.1", f"--port={port}", f"--default-bucket={BUCKET}", "--in-memory", "--quiet")
    server = subprocess.Popen([sys.executable, "-m", "gcp_storage_emulator", "start", *where])
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        with suppress(OSError):
            urllib.request.urlopen(url).close()
            return True
        return False

    try:
        wait_until("the store answers", answers, START_LIMIT_S, alive=lambda: server.poll() is None)
        yield {"STORAGE_EMULATOR_HOST": url}
    finally:
        server.kill()
        server.wait()
