"""The check of the served policy raises no false alarm in hundreds of syncs of all sizes."""

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from lorapar_ray.config import EngineConfig, Resources
from lorapar_ray.engines.actor import start_engine
from lorapar_ray.engines.canaries import canary_tolerance
from lorapar_ray.grpo.engine_pool import EnginePool
from tests.e2e.policy_source import Source
from tests.published import published
from tests.tiny_run import ENGINE

pytestmark = [pytest.mark.e2e, pytest.mark.long]
SYNCS = 500


@pytest.mark.parametrize("sync", ["merged", "adapter"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_false_alarm_in_500_syncs(cluster: None, student: Path, sync: str, dtype: str) -> None:
    source = Source(student, getattr(torch, dtype))

    def engine(_: int) -> Any:
        settings = EngineConfig(**{**ENGINE, "dtype": dtype})
        return start_engine(str(student), settings, Resources(threads=1), seed=0, sync=sync)

    async def go() -> list[float]:
        pool = EnginePool(engine, 1, at_once=8, tolerance=1.0, time_limit_s=300)
        await pool.start()
        with source.model.disable_adapter():
            base = await pool.policy.base_gap(source.canaries())
        pool.policy.tolerance = canary_tolerance(base, 0.01 if dtype == "float32" else 0.2, "")
        draw = random.Random(0)
        gaps = [await published(pool.policy, *source.step(10 ** draw.uniform(-7, -2))) for _ in range(SYNCS)]
        assert max(gaps) < pool.policy.tolerance and pool.supervisor.replaced == 0
        await pool.stop()
        return gaps

    gaps = asyncio.run(go())
    assert len(gaps) == SYNCS
    print(f"{sync}, {dtype}: the largest gap is {max(gaps):.2g} nats")
