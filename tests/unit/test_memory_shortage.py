"""When work that waits for killed processes is ended, and by which error."""

import threading

import pytest
from ray._raylet import GlobalStateAccessor
from ray.core.generated import common_pb2, gcs_pb2

from lorapar_ray import memory_shortage
from lorapar_ray.errors import UserError
from lorapar_ray.memory_shortage import LOOKS, Shortage, ended_without_memory, kills_in


def kills(count: int) -> dict[int, str]:
    """So many kills so far."""
    return {number: f"worker {number} was killed" for number in range(count)}


def test_work_ends_once_enough_looks_have_found_new_kills() -> None:
    shortage = Shortage(kills(3))
    said = [shortage.look(kills(3 + 2 * number)) for number in range(LOOKS + 1)]
    assert said[:-1] == [""] * LOOKS
    assert said[-1] == (
        f"Ray killed {2 * LOOKS} processes while nothing advanced, the last one: worker {2 + 2 * LOOKS} was killed"
    )


def test_many_kills_at_once_and_then_none_do_not_end_it() -> None:
    shortage = Shortage({})
    assert not any(shortage.look(kills(100)) for _ in range(3 * LOOKS))


def test_progress_counts_from_the_beginning_again() -> None:
    shortage = Shortage({})
    for number in range(1, 5 * LOOKS):
        assert not shortage.look(kills(number))
        if number % (LOOKS - 1) == 0:
            shortage.advanced()


def test_work_that_advances_needs_no_look() -> None:
    shortage = Shortage({})
    assert shortage.worth_a_look()
    shortage.advanced()
    assert [shortage.worth_a_look() for _ in range(3)] == [False, True, True]


def test_kills_for_memory_are_found_in_rays_table_of_workers() -> None:
    """A shared cluster has other jobs, and idle processes of no job, which say nothing about this one."""
    assert callable(GlobalStateAccessor.get_worker_table)  # of Ray's private API

    def row(
        name: bytes, job: bytes = b"1", kill: str = "NODE_OUT_OF_MEMORY", alive: bool = False, end: int = 0
    ) -> bytes:
        said = {"exit_type": common_pb2.WorkerExitType.Value(kill), "exit_detail": f"{name.decode()} was killed"}
        found = gcs_pb2.WorkerTableData(is_alive=alive, job_id=job, end_time_ms=end, **said)
        found.worker_address.worker_id = name
        return bytes(found.SerializeToString())

    rows = [row(b"late", end=2), row(b"early", end=1), row(b"other's", b"2"), row(b"idle", b"")]
    rows += [row(b"alive", alive=True), row(b"crashed", kill="SYSTEM_ERROR")]
    assert list(kills_in(rows, b"1").items()) == [(b"early", "early was killed"), (b"late", "late was killed")]
    assert set(kills_in(rows, None)) == {b"early", b"late", b"other's", b"idle"}


def test_a_waiting_command_is_interrupted_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kills are made up; `tests/e2e/test_memory.py` has real ones."""
    looks = iter(range(1000))
    monkeypatch.setattr(memory_shortage, "killed_for_memory", lambda: kills(next(looks)))
    monkeypatch.setattr(memory_shortage, "LOOK_S", 0.01)
    line = r"^label: the machine ran out of memory \(Ray killed .* command resumes$"
    with pytest.raises(UserError, match=line), ended_without_memory("label"):
        threading.Event().wait(60)


def test_runs_that_do_a_stage_together_share_a_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the last one of them is told of progress."""
    monkeypatch.setattr(memory_shortage, "killed_for_memory", dict)
    with ended_without_memory("sft") as first, ended_without_memory("sft") as second:
        assert first == second
    with ended_without_memory("sft") as another:
        assert another != first


def test_an_error_of_the_work_itself_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_shortage, "killed_for_memory", lambda: kills(1))
    with pytest.raises(ZeroDivisionError), ended_without_memory("label"):
        _ = 1 / 0
    with pytest.raises(KeyboardInterrupt), ended_without_memory("label"):
        raise KeyboardInterrupt
