"""When an engine stays for the next stage."""

import pytest

from lorapar_ray.config import EngineConfig, Resources
from lorapar_ray.engines.kept import KeptEngines, keeping_engines, kept_engines
from lorapar_ray.engines.settings import same_engine

WIDE = EngineConfig(max_num_seqs=96)


@pytest.mark.parametrize(
    ("engine", "resources", "same"),
    [
        (WIDE, Resources(cpus=2, gpus=0), True),
        (WIDE, Resources(cpus=1, threads=1, gpus=0), False),
        (WIDE, Resources(cpus=2, gpus=1), False),
        (WIDE, Resources(cpus=2, gpus=0, nodes={"group": "engines"}), False),
        (WIDE.model_copy(update={"max_num_seqs": 32}), Resources(cpus=2, gpus=0), False),
        (WIDE.model_copy(update={"kv_cache_gib": 9.0}), Resources(cpus=2, gpus=0), False),
        (WIDE.model_copy(update={"extra": {"max_logprobs": 5}}), Resources(cpus=2, gpus=0), False),
    ],
)
def test_engines_are_the_same_if_they_compute_alike_in_the_same_place(
    engine: EngineConfig, resources: Resources, same: bool
) -> None:
    assert same_engine(WIDE, Resources(cpus=1, threads=2, gpus=0), engine, resources) is same


def test_only_the_next_stage_takes_them_once() -> None:
    kept = KeptEngines(("grpo", "evaluate", "report"))
    assert kept.leads_to("grpo", "evaluate")
    assert not kept.leads_to("grpo", "report") and not kept.leads_to("report", "evaluate")
    kept.keep(["an engine"])
    assert kept.take() == ["an engine"] and kept.take() == []


def test_nothing_is_kept_outside_a_command() -> None:
    with keeping_engines(("grpo", "evaluate")):
        assert kept_engines().leads_to("grpo", "evaluate")
    assert not kept_engines().leads_to("grpo", "evaluate")
