"""Whether a stage can ever fit the cluster, on clusters described by hand."""

from __future__ import annotations

import pytest

from lorapar_ray.capacity import Capacity, require_fit
from lorapar_ray.config import Resources
from lorapar_ray.errors import UserError

GROUPS = {"workers": (4, Resources(cpus=2, gpus=1))}


def room(has: Capacity, **nodes: str) -> None:
    groups = {name: (count, each.model_copy(update={"nodes": nodes})) for name, (count, each) in GROUPS.items()}
    require_fit("sft", has, groups, "sft.workers")


def test_what_fits_now_is_let_through_in_silence(capsys: pytest.CaptureFixture[str]) -> None:
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


def test_a_cluster_that_stands_at_zero_is_waited_for(capsys: pytest.CaptureFixture[str]) -> None:
    room(Capacity({}, {"CPU": 64, "GPU": 4}))
    said = " ".join(capsys.readouterr().out.split())
    assert "sft waits for nodes: 8 CPU (workers 4 × 2), the cluster has 0 so far" in said
    assert "4 GPU (workers 4 × 1), the cluster has 0 so far" in said


def test_a_label_that_no_node_has_is_named() -> None:
    has = Capacity({"CPU": 8, "GPU": 4}, labels=({"group": "learners", "market": "spot"}, {}))
    room(has, group="learners", market="!on-demand")
    room(has, group="in(rollouts, learners)", market="!in(on-demand,reserved)", zone="!a")
    with pytest.raises(UserError, match="sft: workers asks for nodes with the label group=rollouts, which no node"):
        room(has, group="rollouts")
    with pytest.raises(UserError, match=r"label group=in\(teachers, rollouts\), which no node"):
        room(has, group="in(teachers, rollouts)")
    room(Capacity({}, {"CPU": 64, "GPU": 4}), group="rollouts")  # its nodes are still to come
