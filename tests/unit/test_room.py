"""How many workers have room, on clusters described by hand."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorapar_ray.capacity import Node
from lorapar_ray.config import Resources
from lorapar_ray.room import Waiting, workers_with_room

ONE = Resources(cpus=1)


def node(cpus: float, gpus: float = 0.0, **labels: str) -> Node:
    return Node(labels, {"CPU": cpus, "GPU": gpus})


def number(
    nodes: Sequence[Node], worker: Resources = ONE, fewest: int = 1, multiple: int = 1, first: Sequence[Waiting] = ()
) -> int:
    return workers_with_room(nodes, worker, fewest=fewest, most=8, multiple=multiple, first=first)


@pytest.mark.parametrize(
    ("nodes", "worker", "expected"),
    [
        ([node(3), node(2)], ONE, 5),
        ([node(30)], ONE, 8),  # the most
        ([node(1.5), node(1.5)], Resources(cpus=2), 1),  # no worker is on two nodes; the fewest waits
        ([], ONE, 1),
        ([node(0.3)], Resources(cpus=0.1), 3),
        ([node(8, 2), node(8)], Resources(cpus=1, gpus=1), 2),
        ([node(8, 2.8)], Resources(cpus=1, gpus=1), 2),
        ([node(2, market="spot"), node(4)], Resources(cpus=1, nodes={"market": "spot"}), 2),
        ([node(2, market="spot"), node(4)], Resources(cpus=1, nodes={"market": "!spot"}), 4),
        ([node(0)], Resources(cpus=0), 8),  # asks for nothing
    ],
)
def test_workers_fill_what_is_free(nodes: list[Node], worker: Resources, expected: int) -> None:
    assert number(nodes, worker) == expected


def test_workers_that_share_sequences_come_in_whole_groups() -> None:
    assert [number([node(cpus)], fewest=2, multiple=2) for cpus in range(6)] == [2, 2, 2, 2, 4, 4]


def test_others_get_their_room_first_where_it_costs_the_fewest_workers() -> None:
    engine, wide = Resources(cpus=1), Resources(cpus=2)
    assert number([node(4), node(1)], wide, first=[(1, engine)]) == 2  # on the second node, where no worker fits
    assert number([node(4), node(1)], wide, first=[(2, engine)]) == 1
    assert number([node(4)], first=[(2, engine), (1, Resources(cpus=0.5))]) == 1
    labelled = Resources(cpus=1, nodes={"group": "rollouts"})
    assert number([node(4), node(2, group="rollouts")], first=[(2, labelled)]) == 4


def test_others_that_fewer_workers_would_not_help_wait_on() -> None:
    assert number([node(4)], first=[(1, Resources(cpus=8))]) == 4
    assert number([node(4)], first=[(1, Resources(cpus=1, nodes={"group": "rollouts"}))]) == 4
    assert number([node(4)], fewest=4, first=[(1, ONE)]) == 4  # the fewest need that room
    assert number([node(4)], fewest=2, first=[(9, ONE)]) == 2


amounts = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4)), max_size=5)
processes = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4), st.integers(0, 2)), max_size=3)


@given(free=amounts, others=processes, cpus=st.integers(1, 4), gpus=st.integers(0, 2), fewest=st.integers(1, 3))
def test_what_is_asked_for_is_there(
    free: list[tuple[int, int]], others: list[tuple[int, int, int]], cpus: int, gpus: int, fewest: int
) -> None:
    """Above the fewest, all workers fit into the nodes; others never make them more, and a further node does."""
    nodes = [node(*each) for each in free]
    worker = Resources(cpus=cpus, gpus=gpus)
    first = [(count, Resources(cpus=one, gpus=gpu)) for count, one, gpu in others]
    found = number(nodes, worker, fewest, first=first)
    alone = number(nodes, worker, fewest)
    assert fewest <= found <= alone <= 8
    assert alone == fewest or alone <= sum(each.holds(worker) for each in nodes)
    bigger = number([*nodes, node(cpus, gpus)], worker, fewest)
    assert bigger == min(8, alone + 1) or alone == fewest  # a node that holds one more
