"""How an engine is started, and which weights it loads."""

import pytest
from pydantic import ValidationError

from lorapar_ray.config import EngineConfig, EvaluateConfig, GrpoConfig, Resources
from lorapar_ray.engines.settings import engine_arguments, engine_environment
from lorapar_ray.engines.weight_loading import with_stacked

STACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
LAYER = "model.layers.0"


def test_weights_that_lie_in_one_tensor_are_loaded_together() -> None:
    names = {f"{LAYER}.self_attn.q_proj.weight", f"{LAYER}.mlp.down_proj.weight"}
    whole = with_stacked(names, STACKED)
    assert whole - names == {f"{LAYER}.self_attn.k_proj.weight", f"{LAYER}.self_attn.v_proj.weight"}
    assert with_stacked(whole, STACKED) == whole
    assert with_stacked(names, {}) == names


@pytest.mark.parametrize(("cpus", "threads", "sleep"), [(0.3, 2, True), (0.3, None, False), (1, 2, False)])
def test_threads_on_shared_cores_sleep_while_they_wait(cpus: float, threads: int | None, sleep: bool) -> None:
    environment = engine_environment(EngineConfig(), Resources(cpus=cpus, threads=threads))
    assert environment.get("OMP_WAIT_POLICY") == ("passive" if sleep else None)


def test_an_engine_over_several_gpus_keeps_to_those_of_its_actor() -> None:
    def arguments(ranks: int) -> dict[str, object]:
        return engine_arguments("model", EngineConfig(tensor_parallel=ranks), seed=0, trust_remote_code=False)

    assert arguments(2)["distributed_executor_backend"] == "mp"
    assert "distributed_executor_backend" not in arguments(1)


@pytest.mark.parametrize("gpus", [1, 4, 0.5])
def test_each_rank_needs_a_gpu(gpus: float) -> None:
    engine, resources = EngineConfig(tensor_parallel=2), Resources(gpus=gpus)
    with pytest.raises(ValidationError, match=f"rollout_resources.gpus: {gpus:g} for rollout_engine.tensor_parallel 2"):
        GrpoConfig(rollout_engine=engine, rollout_resources=resources)
    with pytest.raises(ValidationError, match=f"resources.gpus: {gpus:g} for engine.tensor_parallel 2"):
        EvaluateConfig(engine=engine, resources=resources)
    assert GrpoConfig(rollout_engine=engine, rollout_resources=Resources(gpus=2)).rollout_resources.gpus == 2


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"max_completion_length": 1024}, "rollout_engine.max_model_len: 1024 is less than"),
        ({"loss": "cispo"}, "clip_high: 0.28 would shrink"),
        ({"max_staleness": 1, "importance_cap": None}, "importance_cap: nothing else corrects"),
    ],
)
def test_unsafe_settings_of_stage_2_are_refused(settings: dict[str, object], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        GrpoConfig.model_validate(settings)
