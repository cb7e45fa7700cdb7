"""The field that an error names when a machine or an engine refuses a stage."""

import threading
from pathlib import Path

import pytest
import ray
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2.api.exceptions import WorkerGroupError

from lorapar_ray.engines.refusals import CAUSE, leave_cause, refusal, refusing
from lorapar_ray.engines.settings import cache_room
from lorapar_ray.errors import UserError
from lorapar_ray.perform import of_the_machine
from lorapar_ray.runs import RunDirectory

SAID = {  # messages of vLLM, torch and the operating system
    "max_model_len": "ValidationError: 1 validation error for ModelConfig Value error, max_model_len (4096) is",
    "kv_cache_gib": "ValueError: To serve at least one request 8.0 GiB KV cache is needed",
    "extra.gpu_memory_utilization": "ValueError: Free memory on device cuda:0 on startup is less than desired",
    "extra": "TypeError: AsyncEngineArgs.__init__() got an unexpected keyword argument 'nonsense'",
    "tensor_parallel": "ValueError: Total number of attention heads (9) must be divisible by tensor parallel size (2).",
    "dtype": "ValueError: The model type 'gemma3' does not support float16.",
}


@pytest.mark.parametrize("field", sorted(SAID))
def test_the_field_that_an_engine_refuses_is_named(field: str) -> None:
    line = refusal("m", "grpo.rollout_engine", SAID[field])
    assert line.startswith(f"grpo.rollout_engine.{field}: ") and "'m'" in line and "validation error" not in line


@pytest.mark.parametrize(
    ("engine", "share"),
    [
        ("grpo.rollout_engine", "grpo.rollout_resources.gpus"),
        ("evaluate.engine", "evaluate.resources.gpus"),
        ("label.teachers 'a': engine", "label.teachers 'a': resources.gpus"),
        ("model_args", "model_args resources.gpus"),
    ],
)
def test_an_engine_without_room_for_its_cache_on_a_gpu_names_its_share(engine: str, share: str) -> None:
    """`kv_cache_gib` is read on CPUs only."""
    with pytest.raises(ValueError) as error:
        cache_room(20 * 2**30, 20 * 2**30, graphs=False)
    assert refusal("m", engine, f"ValueError: {error.value}", on_gpu=True).startswith(f"{share}: no engine can be")
    line = refusal("m", engine, SAID["kv_cache_gib"], on_gpu=True)
    assert line.startswith(f"{engine}.extra.gpu_memory_utilization (or {share}): ") and "kv_cache_gib" not in line


def test_an_error_about_no_field_names_the_model() -> None:
    assert refusal("m", "evaluate.engine", "SafetensorError: header").startswith("model 'm': evaluate.engine")
    assert refusal("m", "evaluate.engine", "OSError: Address already in use").startswith("evaluate.engine: no engine")


def test_the_cause_that_a_core_leaves_late_is_waited_for(tmp_path: Path) -> None:
    late = threading.Timer(0.3, lambda: leave_cause(tmp_path, OSError("no such file: model.safetensors")))
    late.start()
    with pytest.raises(UserError, match=r"model\.safetensors"), refusing("m", "evaluate.engine", tmp_path):
        raise RuntimeError("Engine core initialization failed. See root cause above. Failed core proc(s): {}")
    late.join()
    assert (tmp_path / CAUSE).is_file()


def test_a_process_that_was_killed_for_memory_is_one_line(tmp_path: Path) -> None:
    killed = ray.exceptions.OutOfMemoryError("1 worker(s) were killed\nMemory on the node was 23 GB / 23 GB")
    group = RuntimeError("worker group failed")
    group.worker_failures = {0: killed}  # type: ignore[attr-defined]
    controller = RuntimeError("controller failed")  # with the error that ended the group
    controller.controller_failure = group  # type: ignore[attr-defined]
    for error in (killed, group, controller):
        with (
            pytest.raises(UserError, match=r"^sft: the machine ran out of memory \(1 worker.*command resumes$"),
            of_the_machine(RunDirectory(tmp_path), "sft"),
        ):
            raise error
    with pytest.raises(RuntimeError, match="a defect"), of_the_machine(RunDirectory(tmp_path), "sft"):
        raise RuntimeError("a defect")


def test_workers_that_were_lost_are_one_line_and_a_defect_is_not(tmp_path: Path) -> None:
    """Where one worker is lost, the others fail in a collective."""
    lost = WorkerHealthCheckFailedError("worker 0 is not healthy", ray.exceptions.ActorDiedError())
    collective = RuntimeError("Connection closed by peer")
    with (
        pytest.raises(UserError, match=r"^sft: its workers or their machines were lost too often \(.*command resumes$"),
        of_the_machine(RunDirectory(tmp_path), "sft"),
    ):
        raise WorkerGroupError("worker group failed", {0: lost, 1: collective})
    with pytest.raises(WorkerGroupError), of_the_machine(RunDirectory(tmp_path), "sft"):
        raise WorkerGroupError("worker group failed", {0: ValueError("a defect"), 1: collective})
