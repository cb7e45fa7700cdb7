"""Asks the nodes whether the trackers of a stage can write there: a worker's environment is its node's, not the
driver's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lorapar_ray.capacity import Node, capacity
from lorapar_ray.config import Config, Resources
from lorapar_ray.errors import UserError
from lorapar_ray.gpus import place
from lorapar_ray.on_nodes import on_nodes
from lorapar_ray.tracker_keys import missing

ANSWER_LIMIT_S = 60
"""For a node to start a process. One that is slower is left out; `lorapar doctor --cluster` reports it."""


def require_keys(config: Config, stage: str) -> None:
    """Check that the trackers of a stage lack nothing on any node that may run its training workers.

    Nodes that join later are not asked, nor is any node about TensorBoard, which needs nothing.

    Raises:
        UserError: names the field, the tracker, the node and what is missing there.
    """
    names, field = remote_trackers(config, stage)
    if not names:
        return
    config = place(config, stage, int(capacity().largest("GPU")))
    workers = {"score": config.score.resources, "sft": config.sft.resources, "grpo": config.grpo.learner_resources}
    for address, found in _on_nodes(names, workers[stage]).items():
        for name, lack in found.items():
            raise UserError(f"{field}: {name} {lack} where Ray starts on {address}; or remove {name} from the list")


def remote_trackers(config: Config, stage: str) -> tuple[list[str], str]:
    """The trackers other than TensorBoard to which a stage writes, and the config's field that names them."""
    named, field = {
        "score": (config.sft.report_to if config.warms_up else [], "sft.report_to"),
        "sft": (config.sft.report_to, "sft.report_to"),
        "grpo": (config.grpo.report_to, "grpo.report_to"),
    }.get(stage, ([], ""))
    return [name for name in named if name != "tensorboard"], field


def _on_nodes(names: Sequence[str], resources: Resources) -> Mapping[str, Mapping[str, str]]:
    """By node's address, what each of these trackers lacks there."""
    import ray

    addresses = {}
    for node in ray.nodes():
        has = Node(dict(node.get("Labels", {})), dict(node["Resources"]))
        if node["Alive"] and has.accepts(resources) and has.holds(resources) >= 1:
            addresses[str(node["NodeID"])] = str(node["NodeManagerAddress"])
    found, _ = on_nodes(lacks, {node: (list(names),) for node in addresses}, ANSWER_LIMIT_S)
    return {addresses[node]: lack for node, lack in found.items()}


def lacks(names: Sequence[str]) -> dict[str, str]:
    """What each of these trackers lacks on this machine; without those that lack nothing (a Ray task)."""
    return {name: lack for name in names if (lack := missing(name))}
