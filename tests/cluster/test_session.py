"""A local Ray starts with a long TMPDIR, is reachable from this machine only, and leaves no files behind, also if the
command gets SIGTERM."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

CODE = """
import json, os, signal, stat, time, psutil, ray
from contextlib import suppress
from pathlib import Path
from lorapar_ray.interrupts import Terminated
from lorapar_ray.session import ray_session

with suppress(Terminated), ray_session():
    @ray.remote
    def where():
        return os.environ["VLLM_RPC_BASE_PATH"]

    rpc = Path(ray.get(where.remote()))
    me = psutil.Process()
    listening = {c.laddr.ip for p in [me, *me.children(recursive=True)] for c in p.net_connections("inet")
                 if c.status == psutil.CONN_LISTEN}
    seen = {"listening": sorted(listening), "mode": stat.S_IMODE(rpc.stat().st_mode), "folder": str(rpc)}
    os.kill(os.getpid(), signal.SIGTERM)
    ray.get(ray.remote(time.sleep).remote(600))
assert "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" not in os.environ
print(json.dumps(seen))
"""


def test_a_local_ray_is_private_wherever_tmpdir_is(tmp_path: Path) -> None:
    long = tmp_path / "scratch.user1" / ("job." + "4711" * 10)
    long.mkdir(parents=True)
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_TMPDIR")} | {
        "TMPDIR": str(long)
    }
    done = subprocess.run(
        [sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, timeout=200, check=True
    )
    seen = json.loads(done.stdout.splitlines()[-1])
    assert "SIGTERM" not in done.stderr
    assert set(seen["listening"]) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert seen["mode"] == stat.S_IRWXU
    assert not Path(seen["folder"]).exists() and list(long.iterdir()) == []
