"""An S3 server on this machine, and the environment for its clients."""

import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

BUCKET = "bucket"
KEYS = {
    "AWS_ACCESS_KEY_ID": "AKIATESTTESTTEST",
    "AWS_SECRET_ACCESS_KEY": "a-secret-of-this-test",
    "AWS_REGION": "us-east-1",
}


@contextmanager
def object_store() -> Iterator[dict[str, str]]:
    """A bucket while the block runs; yields its clients' environment."""
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
