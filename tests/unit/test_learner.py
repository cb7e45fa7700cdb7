"""The learner: several updates on one batch, skipped updates, and passes that depend on memory."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorapar_ray.adapters import attach_lora, save_adapter
from lorapar_ray.config import Config
from lorapar_ray.errors import UserError
from lorapar_ray.grpo.learner import Learner
from lorapar_ray.grpo.samples import MiniBatch, Sample
from lorapar_ray.grpo.worker import GrpoJob
from lorapar_ray.student import load_base
from tests.cluster.test_learners import ADVANTAGES, groups
from tests.tiny_run import save_tiny_student, tiny_config

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> GrpoJob:
    root = tmp_path_factory.mktemp("learner")
    plain = tiny_config(save_tiny_student(root / "student"))
    config = Config.model_validate(plain)
    model = attach_lora(
        load_base(config.model, config.model.path, on=CPU), rank=4, alpha=8, init="gaussian", init_std=0.05
    )
    save_adapter(model, root / "adapter")
    return GrpoJob(
        model=config.model.model_dump(mode="json"),
        settings=config.grpo.model_dump(mode="json"),
        base=config.model.path,
        adapter_in=str(root / "adapter"),
        adapter_out=str(root / "out"),
        regions=None,
        canaries=[[[5, 6, 7, 8], 2], [[9, 10, 11], 1]],
        checkpoints=str(root / "checkpoints"),
        metrics=str(root / "grpo.jsonl"),
        samples=str(root / "samples.jsonl"),
        steps=4,
        coordinator="",
        run="test",
        seed=0,
    )


def learner(job: GrpoJob, **settings: Any) -> Learner:
    settings = {"learning_rate": 1e-2, "max_grad_norm": 10.0, **settings}
    return Learner([replace(job, settings={**job.settings, **settings})])


def step(learner: Learner, share: list[MiniBatch]) -> dict[str, float]:
    """The first step of the only arm, on a share of its batch."""
    return learner.step({0: share}, {0: 0}, 1)[0]


def batch(step: int) -> list[Sample]:
    """Four samples of each of three prompts."""
    return [
        Sample(group.record.prompt_ids, *completion, advantage, finished=True, version=step)
        for group in groups(step)
        for completion, advantage in zip(group.record.completions(), ADVANTAGES, strict=True)
    ]


def whole_batch(samples: list[Sample]) -> MiniBatch:
    return MiniBatch(samples, sum(sample.count for sample in samples), len(samples))


def cut(samples: list[Sample], prompts: int = 3) -> list[MiniBatch]:
    """Mini-batches of `prompts` prompts."""
    size = 4 * prompts
    return [whole_batch(samples[start : start + size]) for start in range(0, len(samples), size)]


def honest(learner: Learner, samples: list[Sample], gap: float = 0.0) -> list[Sample]:
    """The samples as if this learner's policy had sampled them, with log-probabilities `gap` nats off."""
    with torch.no_grad():
        logprobs, _ = learner.forward.logprobs(learner.forward.rows([[it] for it in samples]), temperature=1.0)
    pairs = zip(samples, logprobs, strict=True)
    return [replace(it, logprobs=(own[: len(it.token_ids)] - gap).tolist()) for it, own in pairs]


def adapter(learner: Learner) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in learner.arms[0].parameters.values()])


@pytest.mark.parametrize("loss", ["grpo", "gspo", "cispo"])
def test_the_first_of_two_updates_is_on_policy_and_the_second_is_clipped(job: GrpoJob, loss: str) -> None:
    ours = learner(job, loss=loss, updates_per_batch=2, clip_low=0.02, clip_high=1.02 if loss == "cispo" else 0.02)
    share = cut(honest(ours, batch(0)))
    old: dict[int, torch.Tensor] = {}
    first = ours.updates.take({0: share[0]}, old, 1)[0]
    assert first["clip_high_share"] == first["clip_low_share"] == 0.0
    assert first["ratio_max"] == pytest.approx(1.0, abs=1e-4)
    second = ours.updates.take({0: share[0]}, old, 1)[0]
    assert second["clip_high_share"] > 0.0
    assert second["ratio_max"] == pytest.approx(1.0, abs=1e-4)  # the old policy's, in addition to the sampler's


def test_the_old_policy_of_later_mini_batches_is_the_one_before_the_first_update(job: GrpoJob) -> None:
    ours = learner(job, mini_batch=1)
    share = cut(honest(ours, batch(0)), prompts=1)
    assert [(part.count, part.tokens) for part in share] == [(4, 20), (4, 24), (4, 28)]
    expected = {id(sample): sample.logprobs for part in share for sample in part.samples}
    old = ours.updates.old_logprobs({0: share})
    first = {id(sample) for sample in share[0].samples}
    assert old.keys() == expected.keys() - first
    for key, found in old.items():
        assert found.tolist() == pytest.approx(expected[key], abs=1e-5)
    before = adapter(ours)
    metrics = step(ours, share)
    assert metrics["updates"] == 3 and metrics["updates_skipped"] == 0
    assert step(learner(job), cut(batch(0)))["updates"] == 1  # not cut at all
    assert metrics["logprob_gap"] == pytest.approx(0.0, abs=1e-5)
    assert not torch.equal(adapter(ours), before)


def test_the_ratio_to_the_sampler_is_clipped_where_the_sampler_lags(job: GrpoJob) -> None:
    ours = learner(job, old_policy="sampler", importance_cap=None)
    metrics = step(ours, cut(honest(ours, batch(0), gap=0.5)))
    assert metrics["ratio_mean"] == pytest.approx(math.exp(0.5), rel=1e-3)  # beyond 1.28 throughout
    positive = [it for it in batch(0) if it.advantage > 0]
    tokens = sum(len(it.token_ids) for it in positive)
    assert metrics["clip_high_share"] == pytest.approx(tokens / sum(len(it.token_ids) for it in batch(0)))


@pytest.mark.parametrize("old_policy", ["learner", "sampler"])
def test_samples_far_from_the_sampler_change_nothing(job: GrpoJob, old_policy: str) -> None:
    ours = learner(job, old_policy=old_policy, sequence_ratio_bounds=(0.5, 2.0))
    metrics = step(ours, cut(honest(ours, batch(0), gap=3.0)))
    assert (metrics["sequence_masked_share"], metrics["loss"], metrics["grad_norm"]) == (1.0, 0.0, 0.0)
    near = step(ours, cut(honest(ours, batch(0), gap=0.3)))
    assert near["sequence_masked_share"] == 0.0 and near["grad_norm"] > 0.0


def test_how_samples_are_cut_into_passes_does_not_change_the_update(job: GrpoJob) -> None:
    first = learner(job)
    pairs = zip(honest(first, batch(0)), honest(first, batch(0), gap=3.0), strict=True)
    samples = [far if number % 3 == 0 else near for number, (near, far) in enumerate(pairs)]
    results = []
    cuts = ({"micro_batch_tokens": 24}, {"micro_batch_tokens": 1}, {"micro_batch_size": 1})
    for passes in ({}, *cuts, {"gradient_checkpointing": True}):
        ours = learner(job, loss="bnpo", kl_beta=0.1, sequence_ratio_bounds=(0.5, 2.0), **passes)
        metrics = step(ours, cut(samples))
        results.append((adapter(ours), metrics))
    assert results[0][1]["sequence_masked_share"] == pytest.approx(1 / 3)
    for found in results[1:]:
        torch.testing.assert_close(found[0], results[0][0], rtol=1e-3, atol=1e-5)
        assert found[1] == pytest.approx(results[0][1], rel=1e-3, abs=1e-6)


def test_an_update_that_is_not_finite_is_skipped_and_counted_and_three_in_a_row_stop(job: GrpoJob) -> None:
    ours = learner(job, loss="dapo", importance_cap=None)
    before, good = adapter(ours), cut(batch(0))
    bad = cut([spoilt(it) for it in batch(0)])
    for _ in range(2):
        metrics = step(ours, bad)
        assert metrics["updates_skipped"] == 1 and {"ratio_mean", "entropy", "logprob_gap"} <= metrics.keys()
        assert not {"loss", "grad_norm"} & metrics.keys() and all(map(math.isfinite, metrics.values()))
    assert torch.equal(adapter(ours), before)
    assert step(ours, good)["updates_skipped"] == 0
    assert not torch.equal(adapter(ours), before)
    for _ in range(3):
        ours.arms[0].require_finite()
        step(ours, bad)
    with pytest.raises(UserError, match=r"not finite in 3 updates in a row.*lower grpo.learning_rate"):
        ours.arms[0].require_finite()


def spoilt(sample: Sample) -> Sample:
    return replace(sample, advantage=math.nan)


def test_canaries_are_the_plain_models_with_and_without_the_adapter(job: GrpoJob) -> None:
    ours = learner(job)
    [found], [bare] = ours.canaries(), ours.base_canaries()
    plain = student(job).eval()
    for canary in bare:
        ids = torch.tensor([canary.token_ids])
        expected = (
            plain(ids).logits.float().log_softmax(-1)[0, canary.start - 1 : -1].gather(-1, ids[0, canary.start :, None])
        )
        assert canary.logprobs == pytest.approx(expected[:, 0].tolist(), abs=1e-4)
    assert [each.logprobs for each in found] != [each.logprobs for each in bare]
    assert [each.logprobs for each in ours.canaries()[0]] == [each.logprobs for each in found]


def test_arms_on_one_base_take_the_steps_that_each_takes_alone(job: GrpoJob, tmp_path: Path) -> None:
    """With other adapters, rates, losses, batches and numbers of updates; one of them has nothing to learn from."""
    settings = [
        {"kl_beta": 0.1, "updates_per_batch": 2},
        {"loss": "gspo"},
        {},
        {"learning_rate": 1e-3, "mini_batch": 1},
    ]
    shares = [cut(batch(0)), cut(batch(1)[:4], prompts=1), [], cut(batch(2), prompts=1)]
    jobs = []
    for number, own in enumerate(settings):
        folder = tmp_path / str(number)
        model = attach_lora(student(job), rank=4, alpha=8, init="gaussian", init_std=0.05 + 0.01 * number)
        save_adapter(model, folder)
        common = {"learning_rate": 1e-2, "max_grad_norm": 10.0, **own}
        canaries = [[[5 + number, 6, 7, 8], 2]]
        jobs.append(replace(job, adapter_in=str(folder), settings={**job.settings, **common}, canaries=canaries))
    together = Learner(jobs)
    steps = dict.fromkeys(range(4), 0)
    waits: list[int] = []
    metrics = [together.step(dict(enumerate(shares)), steps, 1, waits.append) for _ in range(2)]
    assert sorted(waits) == sorted([*steps, *steps])
    for number, share in enumerate(shares):
        alone = Learner([jobs[number]])
        for found in metrics:
            expected = alone.step({0: share}, {0: 0}, 1)[0]
            assert found[number] == pytest.approx(expected, rel=1e-4, abs=1e-6)
            assert found[number]["loss"] == pytest.approx(expected["loss"], rel=1e-5, abs=1e-8)
        for key, value in alone.arms[0].parameters.items():
            torch.testing.assert_close(together.arms[number].parameters[key].data, value.data, rtol=1e-3, atol=1e-6)
        for ours, theirs in (
            (together.canaries()[number], alone.canaries()[0]),
            (together.base_canaries()[number], alone.base_canaries()[0]),
        ):
            assert [each.logprobs for each in ours] == [pytest.approx(each.logprobs, abs=1e-5) for each in theirs]


def student(job: GrpoJob) -> Any:
    """The base."""
    return load_base(Config.model_validate(tiny_config(Path(job.base))).model, job.base, on=CPU)
