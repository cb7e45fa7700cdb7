"""`lorapar serve` on a cluster loses its engine's machine, and then that machine's network for a while: a client that
waits gets the same answers."""

import os
import signal
from pathlib import Path
from random import Random

import pytest

from tests.chaos import Recovery
from tests.e2e.test_serve import SECRET
from tests.e2e.test_serve_losses import END_S, asks, meanwhile
from tests.hosts.conftest import FarRun
from tests.hosts.machines import SHARED
from tests.hosts.run import Sent
from tests.hosts.test_losses import CUT, NODE, cut_off
from tests.waiting import wait_until

pytestmark = pytest.mark.hosts
PORT = 8000


def said_since(log: Path, start: int) -> str:
    """What a log holds from a byte on."""
    return log.read_bytes()[start:].decode(errors="replace")


@pytest.mark.fault("serve", "node", "network cut and healed")
def test_a_server_whose_engine_loses_its_machine(far: FarRun, sent: Sent, chance: Random, recovery: Recovery) -> None:
    assert far.status == 0, far.output[-3000:]
    cluster, head = sent.cluster, sent.cluster.on["head"]
    start, restarts = head.log.stat().st_size, len(cluster.restarts)
    command = ["lorapar", "serve", "--run-dir", f"{SHARED}/runs/tiny", "--host", head.address, "--port", str(PORT)]
    process = head.start(command, {**cluster.environment("head"), "LORAPAR_API_KEY": SECRET})

    def serves() -> bool:
        assert process.poll() is None, said_since(head.log, start)
        return "serving base, sft, grpo" in said_since(head.log, start)

    wait_until("it serves", serves, 300)
    answers = asks(f"http://{head.address}:{PORT}/v1", chance.randrange(100))
    undisturbed = answers()

    def lose_engines() -> None:
        """An engine answers for some seconds after its node's end: until the whole machine is gone."""
        cluster.kill_raylet("engines")
        wait_until("the machine is lost", lambda: len(cluster.restarts) > restarts)

    with recovery("serve", NODE):
        assert meanwhile(answers, lose_engines) == undisturbed
        assert answers() == undisturbed
    assert cluster.restarts[restarts:] == ["engines"]
    with recovery("serve", CUT):
        assert meanwhile(answers, lambda: cut_off(cluster.on["engines"])) == undisturbed
        assert answers() == undisturbed
    [own] = [pid for pid, line in head.processes().items() if "lorapar serve" in line and "nsenter" not in line]
    os.kill(own, signal.SIGINT)
    assert process.wait(END_S) == 0, said_since(head.log, start)
