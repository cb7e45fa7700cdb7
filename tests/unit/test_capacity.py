"""Whether a stage can ever fit a cluster, on clusters described by hand."""

from __future__ import annotations

from dataclasses import replace
from threading import Event

import pytest

from lorapar_ray import capacity
from lorapar_ray.capacity import Capacity, Node, needing, require_fit, require_soon
from lorapar_ray.config import Resources
from lorapar_ray.errors import UserError

GROUPS = {"workers": (4, Resources(cpus=2, gpus=1))}


def room(has: Capacity, **nodes: str) -> None:
    groups = {name: (count, each.model_copy(update={"nodes": nodes})) for name, (count, each) in GROUPS.items()}
    require_fit("sft", has, groups, "sft.workers")


def test_what_fits_now_passes_silently(capsys: pytest.CaptureFixture[str]) -> None:
    room(Capacity({"CPU": 8, "GPU": 4}))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("has", "said"),
    [
        (
            Capacity({"CPU": 7, "GPU": 4}),
            r"sft: asks for 8 CPU \(workers 4 × 2\) but the cluster has 7; lower sft.workers",
        ),
        (Capacity({"CPU": 8}), "asks for 4 GPU .* but the cluster has 0; .*cluster.max_gpus if it grows on demand"),
        (Capacity({"CPU": 8}, {"GPU": 3}), "asks for 4 GPU .* but the cluster has 0 and may grow to 3"),
    ],
)
def test_what_can_never_fit_is_refused(has: Capacity, said: str) -> None:
    with pytest.raises(UserError, match=said):
        room(has)


def test_an_autoscaling_cluster_without_nodes_is_waited_for(capsys: pytest.CaptureFixture[str]) -> None:
    room(Capacity({}, {"CPU": 64, "GPU": 4}))
    said = " ".join(capsys.readouterr().out.split())
    assert "sft waits for nodes: 8 CPU (workers 4 × 2), the cluster has 0 so far" in said
    assert "4 GPU (workers 4 × 1), the cluster has 0 so far" in said


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        (
            {"group": "learners"},
            "workers asks for nodes with the label group=learners, which no node of this cluster has",
        ),
        ({}, "asks for workers 4 × 2 CPU and 1 GPU, each on a single node, but the nodes have room for 0"),
    ],
)
def test_a_cluster_that_may_grow_by_other_nodes_is_waited_for_aloud(
    nodes: dict[str, str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Enough in total is there, but not on nodes that these processes can use."""
    amounts = {"CPU": 1.0, "GPU": 1.0}
    has = Capacity({"CPU": 8, "GPU": 8}, {"CPU": 64, "GPU": 8}, (Node({"group": "teachers"}, amounts),) * 8)
    room(has, **nodes)
    assert " ".join(capsys.readouterr().out.split()) == f"sft waits for nodes: {said} so far"
    room(replace(has, now={"CPU": 1.0, "GPU": 8}), **nodes)  # the label says more than the amount, the room does not
    assert len(capsys.readouterr().out.split("sft waits for nodes: ")) - 1 == 1 + bool(nodes)


def test_a_label_that_no_node_has_is_named() -> None:
    amounts = {"CPU": 8.0, "GPU": 4.0}
    has = Capacity(amounts, nodes=(Node({"group": "learners", "market": "spot"}, amounts), Node({}, {})))
    room(has, group="learners", market="!on-demand")
    room(has, group="in(rollouts, learners)", market="!in(on-demand,reserved)", zone="!a")
    with pytest.raises(UserError, match="sft: workers asks for nodes with the label group=rollouts, which no node"):
        room(has, group="rollouts")
    with pytest.raises(UserError, match=r"label group=in\(teachers, rollouts\), which no node"):
        room(has, group="in(teachers, rollouts)")
    room(Capacity({}, {"CPU": 64, "GPU": 4}), group="rollouts")  # its nodes may still join


def test_processes_that_no_single_node_holds_are_refused() -> None:
    small = tuple(Node({"group": "a"}, {"CPU": 3.0, "GPU": 2.0}) for _ in range(4))
    large = Node({"group": "b"}, {"CPU": 64.0, "GPU": 8.0})
    room(Capacity({"CPU": 12, "GPU": 8}, nodes=small))
    said = (
        r"sft: asks for workers 4 × 2 CPU and 1 GPU, each on a single node with group=a, but the nodes have room for 3"
    )
    with pytest.raises(UserError, match=said):
        room(Capacity({"CPU": 73, "GPU": 14}, nodes=(*small[:3], large)), group="a")
    with pytest.raises(UserError, match=r"but the nodes have room for 0; lower sft\.workers"):
        room(Capacity({"CPU": 8, "GPU": 4}, nodes=(Node({}, {"CPU": 1.0, "GPU": 4.0}),) * 8))
    room(Capacity({"CPU": 12, "GPU": 8}, {"CPU": 99}, nodes=small[:1]))  # it may grow


@pytest.mark.parametrize(
    ("resources", "count"),
    [
        (Resources(cpus=0.1), 30),  # three CPUs, without rounding of binary fractions
        (Resources(cpus=0, gpus=0.6), 2),  # a process never gets parts of two GPUs
        (Resources(cpus=0, gpus=0.5), 4),
        (Resources(cpus=0, gpus=2), 1),
        (Resources(cpus=4), 0),
        (Resources(cpus=0), float("inf")),
    ],
)
def test_how_many_processes_a_node_holds(resources: Resources, count: float) -> None:
    assert Node({}, {"CPU": 3.0, "GPU": 2.0}).holds(resources) == count


def test_a_lost_node_is_waited_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(capacity, "LOOK_AGAIN_S", 0.0)
    groups = {"workers": (1, Resources(cpus=2, nodes={"group": "a"}))}
    other, wanted = (Node({"group": group}, {"CPU": 2.0}) for group in "ba")
    without = Capacity({"CPU": 2}, nodes=(other,), lost=1)
    seen = iter([without, without, Capacity({"CPU": 4}, nodes=(other, wanted), lost=1)])
    require_soon("sft", lambda: next(seen), groups, "sft.workers", 60.0)
    said = " ".join(capsys.readouterr().out.split())
    assert (
        said.count("sft waits up to 60 s for a node that was lost: sft: workers asks for nodes with the label group=a")
        == 1
    )
    assert next(seen, None) is None
    with pytest.raises(UserError, match="group=a, which no node"):
        require_soon("sft", lambda: without, groups, "sft.workers", 0.0)
    never = Capacity({"CPU": 2}, nodes=(other,))
    with pytest.raises(UserError, match="group=a, which no node"):
        require_soon("sft", lambda: never, groups, "sft.workers", 60.0)


def test_a_stage_that_waits_for_lost_nodes_is_reported_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on a cluster that may grow again; a check that fails since the connection has ended prints nothing."""
    amounts = {"CPU": 8.0, "GPU": 4.0}
    whole, half = (Capacity(each, {"CPU": 64.0, "GPU": 8.0}, (Node({}, each),)) for each in (amounts, {"CPU": 4.0}))
    seen, all_seen = [half, half, whole, half, half, whole, half], Event()

    def look() -> Capacity:
        if not seen:
            all_seen.set()
        return seen.pop(0)

    monkeypatch.setattr(capacity, "capacity", look)
    monkeypatch.setattr(capacity, "LOOK_WHILE_WORKING_S", 0.001)
    with needing("sft", GROUPS):
        assert all_seen.wait(10)
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("sft waits for nodes: asks for 8 CPU (workers 4 × 2) but the cluster has 4") == 2
