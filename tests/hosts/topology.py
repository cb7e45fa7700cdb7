"""The services of `cluster/compose.yaml`, each on a machine of its own, started by the commands that the file says."""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from tests.hosts.machines import Machine, machines
from tests.tiny_run import ROOT
from tests.waiting import wait_until

COMPOSE = ROOT / "cluster" / "compose.yaml"
START_LIMIT_S = 180


class Topology:
    """A Ray cluster over machines; a service that fails is started again, as the file asks."""

    def __init__(self, services: Mapping[str, Any], on: Mapping[str, Machine], variables: Mapping[str, str]) -> None:
        self.on = on
        self.token = variables["RAY_AUTH_TOKEN"]
        self.restarts: list[str] = []
        """Services that were started again."""
        self._services = services
        self._variables = variables
        self._over = threading.Event()
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}
        self._keeper = threading.Thread(target=self._keep_up, daemon=True)

    @property
    def address(self) -> str:
        """Of the dashboard, as another machine on the network reaches it."""
        return f"http://{self.on['head'].address}:8265"

    def environment(self, name: str) -> dict[str, str]:
        """A service's own."""
        given = self._services[name]["environment"]
        return {key: substituted(str(value), self._variables) for key, value in given.items()}

    def start(self) -> None:
        """Start every service in the file's order, in which each comes behind what it depends on. One whose command
        fails, as Ray's may on a busy machine, is started again."""
        self._keeper.start()
        for name, service in self._services.items():
            for needed in service.get("depends_on", {}):
                self._wait_for(needed, self._healthy)
            self._begin(name)
            self._wait_for(name, self._runs)
        self.restarts.clear()

    def stop(self) -> None:
        """No service is started any more."""
        self._over.set()
        if self._keeper.is_alive():
            self._keeper.join()

    def _wait_for(self, name: str, state: Callable[[str], bool]) -> None:
        try:
            wait_until(name, partial(state, name), START_LIMIT_S)
        except TimeoutError:
            raise RuntimeError(f"{name} did not start: {self.on[name].log.read_text()[-3000:]}") from None

    def _runs(self, name: str) -> bool:
        """Whether a service's command has said that its node runs."""
        return self._nodes[name].poll() is None and "Ray runtime started" in self.on[name].log.read_text()

    def _begin(self, name: str) -> None:
        self._nodes[name] = self.on[name].start(self._services[name]["command"], self.environment(name))

    def _keep_up(self) -> None:
        """`restart: on-failure`: everything of a container ends with its command, then that is started again."""
        while not self._over.wait(0.5):
            for name, node in list(self._nodes.items()):
                if node.poll() in (None, 0) or self._services[name]["restart"] != "on-failure":
                    continue
                for left in self.on[name].processes():
                    with suppress(ProcessLookupError):
                        os.kill(left, signal.SIGKILL)
                self.restarts.append(name)
                self._begin(name)

    def kill_raylet(self, name: str) -> None:
        """End a machine's Ray node by `kill -9`."""
        found = self.on[name].processes().items()
        [raylet] = [pid for pid, line in found if line.partition(" ")[0].endswith("/raylet")]
        os.kill(raylet, signal.SIGKILL)

    def _healthy(self, name: str) -> bool:
        """Whether a service's health check succeeds."""
        check = self._services[name]["healthcheck"]["test"]
        assert check[0] == "CMD"
        return self.on[name].run(check[1:], self.environment(name))[0] == 0

    def client(self, **changed: str) -> dict[str, str]:
        """Environment of a machine that is no part of the cluster and may submit to it."""
        own = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "LORAPAR_"))}
        return own | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token, **changed}


@contextmanager
def topology(folder: Path) -> Iterator[Topology]:
    """The cluster of the compose file while the block runs; its volume is `folder / "shared"`."""
    compose = yaml.safe_load(COMPOSE.read_text())
    services = compose["services"]
    [(name, volume)] = [each.split(":") for each in services["head"]["volumes"]]
    assert volume == "/shared" and name in compose["volumes"]
    variables = {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with machines(list(services), folder, services["head"]["shm_size"].removesuffix("b")) as on:
        cluster = Topology(services, on, variables)
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


def substituted(text: str, variables: Mapping[str, str]) -> str:
    """`${NAME:?why}` and `${NAME:-other}` as Docker Compose fills them in."""

    def value(found: re.Match[str]) -> str:
        name, operator, otherwise = found.groups()
        return variables.get(name) or (otherwise if operator == ":-" else "")

    return re.sub(r"\$\{(\w+)(:[?-])([^}]*)\}", value, text)
