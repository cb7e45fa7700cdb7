"""The check of the served policy detects every injected way in which an engine could serve another policy."""

import asyncio
import os
import signal
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import psutil
import pytest
import torch

from lorapar_ray.config import EngineConfig, GrpoConfig, Resources
from lorapar_ray.engines.actor import start_engine
from lorapar_ray.engines.mismatch import PolicyMismatch
from lorapar_ray.engines.record import GroupHead
from lorapar_ray.grpo.engine_pool import EnginePool
from lorapar_ray.grpo.head import TokenScorer
from lorapar_ray.grpo.packing import packed_logprobs, pad
from lorapar_ray.grpo.sampler import new_engine
from lorapar_ray.grpo.samples import Sample
from tests.e2e.faulty_engine import ADAPTER, CACHE, CANARIES, FAULT, MERGED, FaultyEngine
from tests.e2e.policy_source import TOKENS, Source
from tests.published import published
from tests.tiny_run import ENGINE

pytestmark = pytest.mark.e2e
TOLERANCE = 1e-3
SAMPLING = {"n": 2, "temperature": 1.0, "max_tokens": 8, "seed": 0}


def engine_of(student: Path, fault: Path, sync: str) -> Any:
    extra = {"worker_extension_cls": "tests.e2e.faulty_engine.FaultyLoader", "max_num_batched_tokens": 256}
    settings = EngineConfig(**ENGINE, extra=extra)
    environment = {FAULT: str(fault)}
    return start_engine(
        str(student), settings, Resources(), seed=0, sync=sync, adapters=4, actor=FaultyEngine, environment=environment
    )


def pool_of(student: Path, fault: Path, sync: str) -> EnginePool:
    fault.write_text("none")
    return EnginePool(lambda _: engine_of(student, fault, sync), 1, at_once=8, tolerance=TOLERANCE, time_limit_s=300)


def test_a_policy_that_is_not_the_learners_is_caught_and_a_lost_engine_replaced(
    chance: Random, thorough: bool, cluster: None, student: Path, tmp_path: Path
) -> None:
    """One way to lose an engine is drawn; `--chaos all` has both."""
    fault = tmp_path / "fault"
    source = Source(student)

    async def go() -> None:
        pool = pool_of(student, fault, "merged")
        await pool.start()
        assert (
            await published(pool.policy, *source.next("q_proj", "v_proj")) < TOLERANCE
        )  # vLLM keeps q, k and v in one tensor
        assert await published(pool.policy, *source.next()) < TOLERANCE
        await no_gap_passes_a_tolerance_below_it(pool, source)
        await ratios_of_a_cut_distribution(pool, source)
        await every_fault_is_caught_at_once(pool, source, fault, MERGED)
        await many_seeded_prompts(pool)
        ways = (hangs_while_it_samples, dies_while_it_loads)
        drawn = ways if thorough else [chance.choice(ways)]
        for lose in drawn:
            await lose(pool, source)
            assert await published(pool.policy, *source.next()) < TOLERANCE
        assert pool.supervisor.replaced == len(drawn)
        await pool.stop()

    asyncio.run(go())


def test_an_adapter_is_swapped_under_requests_that_go_on_with_their_own(
    cluster: None, student: Path, tmp_path: Path
) -> None:
    fault = tmp_path / "fault"
    source = Source(student)

    async def go() -> None:
        pool = pool_of(student, fault, "adapter")
        await pool.start()
        assert await published(pool.policy, *source.next()) < TOLERANCE
        sampling = {**SAMPLING, "max_tokens": 170, "ignore_eos": True}
        for count in (16, 64, 256):  # the faster the engine, the more it needs not to be done before the loads
            if await outlasts_three_loads(pool, source, {**sampling, "n": count}):
                break
        else:
            pytest.fail("the engine was always done before the loads")
        assert await published(pool.policy, *source.next()) < TOLERANCE
        await given_back_in_the_middle(pool, {**sampling, "n": 4})
        await every_fault_is_caught_at_once(pool, source, fault, ADAPTER)
        assert pool.supervisor.replaced == 0
        await pool.stop()

    asyncio.run(go())


def test_a_staleness_of_two_has_three_policies_in_use_at_once(cluster: None, student: Path) -> None:
    """With fewer slots vLLM drops the policy that was just loaded, and the run would end for nothing."""
    settings = GrpoConfig(
        max_staleness=2,
        sync="adapter",
        rollout_engine=EngineConfig(**ENGINE | {"max_num_seqs": 64}),
        rollout_resources=Resources(gpus=0),
        max_prompt_length=80,
        max_completion_length=170,
    )
    plan = {"settings": settings.model_dump(mode="json"), "model": str(student), "lora_rank": 4}
    source = Source(student)

    async def go() -> None:
        start = partial(new_engine, {**plan, "seed": 0, "trust_remote_code": False}, None)
        pool = EnginePool(start, 1, at_once=8, tolerance=TOLERANCE, time_limit_s=300)
        await pool.start()
        sampling = {**SAMPLING, "max_tokens": 170, "ignore_eos": True}
        for count in (4, 16, 64):  # as above
            groups = {}
            for key in ("first", "second", "third"):
                assert await published(pool.policy, *source.next()) < TOLERANCE
                groups[source.version] = await begun(pool, {**sampling, "n": count}, f"{key} of {count}")
            together = not any(group.done() for group in groups.values())
            heads = [await group for group in groups.values()]
            assert [head.versions for _, head in heads] == [(version,) * count for version in groups]
            if together:
                break
        else:
            pytest.fail("the engine was always done before the third policy")
        assert pool.supervisor.replaced == 0
        await pool.stop()

    asyncio.run(go())


async def no_gap_passes_a_tolerance_below_it(pool: EnginePool, source: Source) -> None:
    """What follows for the run is in cluster/test_learners.py."""
    pool.policy.tolerance = 1e-12
    with pytest.raises(PolicyMismatch, match=rf"does not serve policy {source.version + 1}: .*{CANARIES}"):
        await published(pool.policy, *source.next())
    pool.policy.tolerance = TOLERANCE


async def every_fault_is_caught_at_once(
    pool: EnginePool, source: Source, fault: Path, faults: Mapping[str, str]
) -> None:
    """Each by the publish that has it, for the reason in `faults`; the honest publish after it passes."""
    for kind, says in faults.items():
        fault.write_text(kind)
        if says == CACHE:  # these entries are created with the fault, and become stale
            await published(pool.policy, *source.next())
        with pytest.raises(PolicyMismatch, match=says):
            await published(pool.policy, *source.next())
            pytest.fail(kind)
        fault.write_text("none")
        assert await published(pool.policy, *source.next()) < TOLERANCE, kind


async def ratios_of_a_cut_distribution(pool: EnginePool, source: Source) -> None:
    """With top-k and top-p the learner's ratios at the same policy are 1; over the whole vocabulary they are not."""
    sampling = {**SAMPLING, "n": 4, "max_tokens": 16, "ignore_eos": True, "top_k": 20, "top_p": 0.9}
    reference, _ = await pool.rollout("cut", TOKENS, sampling)
    record = await reference
    assert record.kept is not None and 1 <= record.kept.counts.min() <= record.kept.counts.max() <= 20
    gaps = []
    for cut in (True, False):
        samples = [
            Sample(record.prompt_ids, *completion, 1.0, True, 0, kept=kept if cut else None)
            for completion, kept in zip(record.completions(), record.kept_sets(), strict=True)
        ]
        rows = pad(samples, 0, torch.device("cpu"))
        with torch.no_grad():
            logprobs_BT, _ = packed_logprobs(TokenScorer(source.model), rows, temperature=1.0)
        gaps.append((logprobs_BT - rows.sampling_logprobs_BT).exp())
    assert gaps[0].min() > 1 - 1e-3 and gaps[0].max() < 1 + 1e-3
    assert gaps[1].max() < 0.95


async def many_seeded_prompts(pool: EnginePool) -> None:
    """More than fit in one step, each with a seed: other sequences in the batch do not change the tokens."""
    prompts = [[7 + (n * k) % 4000 for k in range(1, 101)] for n in range(1, 9)]
    together, alone = await sampled(pool, prompts), await sampled(pool, prompts[:1])
    assert alone == together[:1]
    assert len({tuple(tokens) for group in together for tokens in group}) == 2 * len(prompts)


async def hangs_while_it_samples(pool: EnginePool, source: Source) -> None:
    """An engine that neither dies nor answers."""
    stop_the_engine_of(await pid_of_the_engine(pool))
    pool.supervisor.time_limit_s = 5.0
    _, head = await pool.rollout("hangs", TOKENS, SAMPLING)
    assert head.versions == (source.version,) * 2
    pool.supervisor.time_limit_s = 3600.0


async def dies_while_it_loads(pool: EnginePool, source: Source) -> None:
    """An engine that dies during a call to its workers, which vLLM never answers."""
    pid = await pid_of_the_engine(pool)
    stop_the_engine_of(pid)
    publishing = asyncio.create_task(published(pool.policy, *source.next()))
    await asyncio.sleep(1.0)
    assert not publishing.done()
    stop_the_engine_of(pid, signal.SIGKILL)
    assert await publishing < TOLERANCE


async def pid_of_the_engine(pool: EnginePool) -> int:
    """Of its actor."""
    [told] = await asyncio.gather(*(engine.start.remote() for engine in pool.supervisor.engines))
    return int(told["pid"])


async def outlasts_three_loads(pool: EnginePool, source: Source, sampling: dict[str, Any]) -> bool:
    """Whether a group was in flight all along; every token of it is its first policy's."""
    version = source.version
    rollout = await begun(pool, sampling)
    for _ in range(3):
        await published(pool.policy, source.next()[0], [])
    lasted = not rollout.done()
    _, head = await rollout
    assert (head.lengths, head.versions) == ((170,) * sampling["n"], (version,) * sampling["n"])
    return lasted


async def begun(pool: EnginePool, sampling: dict[str, Any], key: str = "group") -> asyncio.Task[tuple[Any, GroupHead]]:
    """A rollout, a group of that key, that has its first tokens."""
    [engine] = pool.supervisor.engines
    rollout = asyncio.create_task(pool.rollout(key, TOKENS, sampling))
    seen: dict[str, int] = {}
    while not seen.get(key):
        assert not rollout.done()
        seen = await engine.progress.options(num_returns=2).remote()[1]
    return rollout


async def given_back_in_the_middle(pool: EnginePool, sampling: dict[str, Any]) -> None:
    """An interrupted completion continues with the tokens that the policy would have sampled."""
    rollout = await begun(pool, sampling)
    [engine] = pool.supervisor.engines
    await engine.give_back.remote("group")
    reference, head = await rollout
    record = await reference
    assert (head.lengths, head.open, head.finished) == ((170,) * 4, (), (False,) * 4) and head == record.head
    for ids, logprobs in record.completions():
        scored = await engine.score.remote([*TOKENS, *ids.tolist()], len(TOKENS))
        assert logprobs.tolist() == pytest.approx(scored, abs=1e-3)


async def sampled(pool: EnginePool, prompts: list[list[int]]) -> list[list[list[int]]]:
    [engine] = pool.supervisor.engines
    groups = await engine.generate.remote(prompts, SAMPLING)
    return [[done.token_ids for done in group] for group in groups]


def stop_the_engine_of(pid: int, how: int = signal.SIGSTOP) -> None:
    """Stop an actor's engine, so that it neither dies nor answers, or kill it."""
    for child in psutil.Process(pid).children(recursive=True):
        os.kill(child.pid, how)
