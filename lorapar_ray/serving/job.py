"""`lorapar serve`: deploys a finished run on Ray Serve until the command ends."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as ds

from lorapar_ray.adapters import read_adapter_state
from lorapar_ray.capacity import capacity, needing
from lorapar_ray.config import Config
from lorapar_ray.engines.settings import engine_environment
from lorapar_ray.errors import UserError
from lorapar_ray.gpus import place
from lorapar_ray.labeling.job import student_name
from lorapar_ray.memory_shortage import ended_without_memory
from lorapar_ray.models import model_reference
from lorapar_ray.pipeline import is_done
from lorapar_ray.runs import RunDirectory
from lorapar_ray.serve_apps import deployed, end, runs_as_asked, start_serve
from lorapar_ray.serving.openai_side import BASE
from lorapar_ray.serving.requests import AUTO, digest_of
from lorapar_ray.serving.routing import QUESTIONS, stages_by_system
from lorapar_ray.session import is_own_ray
from lorapar_ray.text import one_line

APP = "lorapar-serve"
KEY = "LORAPAR_API_KEY"
"""Environment variable that holds the server's key."""
PLAIN_HTTP = {"location": "HeadOnly", "root_path": "", "ssl_certfile": None}
"""What `Address.url` supposes."""
READY_S = 120.0
"""Time for a running replica to report what it serves."""


@dataclass(frozen=True)
class Address:
    """Where the server listens."""

    host: str = "127.0.0.1"
    port: int = 8000

    @property
    def url(self) -> str:
        """The URL for clients."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}/v1"


def server_key(address: Address) -> str | None:
    """The key from the environment; None if there is none and only this machine can reach the address.

    Raises:
        UserError: there is no key, and other machines can reach the address.
    """
    key = os.environ.get(KEY) or None
    local = address.host == "localhost" or (_is_ip(address.host) and ip_address(address.host).is_loopback)
    if key is None and not local:
        raise UserError(f"--host {address.host}: other machines can reach it; set a key in {KEY}, or remove --host")
    return key


def require_free(address: Address) -> None:
    """Check that the port is free; Serve would retry forever.

    Raises:
        UserError: the port is taken, or this machine has no such address.
    """
    try:
        with socket.create_server((address.host, address.port), family=_family(address.host)):
            pass
    except OSError as error:
        raise UserError(
            f"--port {address.port}: cannot listen there ({error.strerror or error}); choose another"
        ) from None


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _is_ip(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def finished_adapters(config: Config, run: RunDirectory) -> dict[str, Path]:
    """The PEFT adapter of each finished training stage.

    Raises:
        UserError: the adapters are not LoRA; one engine can serve only LoRA adapters together.
    """
    if config.adapter.method != "lora":
        raise UserError(
            f"adapter.method {config.adapter.method}: `lorapar serve` serves LoRA; export the adapter instead"
        )
    folders: dict[str, Path] = {"sft": run.sft / "adapter", "grpo": run.grpo / "adapter"}
    return {stage: folders[stage] for stage in config.order if is_done(config, run, stage)}


def labelled_questions(config: Config, run: RunDirectory, adapters: Mapping[str, Path]) -> dict[int, list[str]]:
    """Questions of each System to fit the threshold of `auto`, drawn with the run's seed; empty: no `auto`."""
    stages = stages_by_system(config)
    if not stages or not set(stages.values()) <= set(adapters) or not run.labels.is_dir():
        return {}
    if run.entry("label").get("status") == "started":  # they replace the labels of these adapters
        return {}
    labels = ds.dataset(run.labels, format="parquet")
    systems = labels.to_table(columns=["system"])["system"].to_numpy()
    found: dict[int, list[str]] = {}
    for system in (1, 2):
        own = np.flatnonzero(systems == system).tolist()
        chosen = random.Random(config.seed).sample(own, min(QUESTIONS, len(own)))
        found[system] = labels.take(chosen, columns=["prompt"])["prompt"].to_pylist() if chosen else []
    return found if all(found.values()) else {}


@contextmanager
def serving(config: Config, run: RunDirectory, address: Address, replicas: int = 1) -> Iterator[dict[str, Any]]:
    """Serve while the block runs; needs a connection to Ray. Yields the models' names and the agreement of `auto`.

    Raises:
        UserError: the run has not finished a stage, the cluster is too small, the port is taken, another `lorapar
            serve` runs there, its Serve listens elsewhere, or the engine cannot start.
    """
    import ray
    from ray import serve

    key, adapters = server_key(address), finished_adapters(config, run)
    if is_own_ray():
        require_free(address)
    config = place(config, "evaluate", int(capacity().largest("GPU")))
    with needing("serve", {"replicas": (replicas, config.evaluate.resources)}, "--replicas"):
        server = _server(config, run, adapters, replicas, key)
        http = {"host": address.host, "port": address.port, **PLAIN_HTTP}
        own = False
        try:
            own = not runs_as_asked(APP, **http)  # then its failed start is ours to end, too
            with ended_without_memory("serve"):
                start_serve(**http)
                own = False  # until it is checked: another command may have begun it meanwhile
                runs_as_asked(APP, **http)
                own = True
                [(_, why)] = deployed([serve.RunTarget(server, name=APP, route_prefix="/")], {APP: APP})
                if why:
                    raise UserError(f"serve: could not start ({why})")
                told = serve.get_app_handle(APP).ready.remote().result(timeout_s=READY_S)
            yield {"models": [BASE, *adapters, *([AUTO] if "agreement" in told else [])], **told}
        except (RuntimeError, ray.exceptions.RayError, TimeoutError) as error:
            raise UserError(f"serve: could not start ({one_line(error, 300)})") from error
        finally:
            if own:
                end([APP])


def _server(config: Config, run: RunDirectory, adapters: Mapping[str, Path], replicas: int, key: str | None) -> Any:
    """The Serve application: `replicas` of an engine with all adapters."""
    from ray import serve

    from lorapar_ray.serving.replica import Replica
    from lorapar_ray.workers import ray_options

    settings = config.evaluate
    fields = config.model_dump(mode="json")
    fields["model"]["path"] = model_reference(config.model.path)
    ranks = [
        len(value)
        for folder in adapters.values()
        for name, value in read_adapter_state(folder).items()
        if "lora_A" in name
    ]
    deployment = serve.deployment(Replica).options(
        name="server",
        num_replicas=replicas,
        max_ongoing_requests=2 * settings.engine.max_num_seqs,
        max_queued_requests=8 * settings.engine.max_num_seqs,
        health_check_timeout_s=120,
        ray_actor_options={
            **ray_options(settings.resources),
            "runtime_env": {"env_vars": engine_environment(settings.engine, settings.resources)},
        },
    )
    return deployment.bind(
        fields,
        {name: run.address(folder) for name, folder in adapters.items()},
        max(ranks, default=8),
        student_name(config),
        labelled_questions(config, run, adapters),
        None if key is None else digest_of(key),
    )
