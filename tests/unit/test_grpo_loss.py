"""GRPO losses, compared with TRL's `_compute_loss` on the same tensors and with hand-computed cases."""

import math
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from lorapar_ray import logprobs
from lorapar_ray.config.grpo import LEAST_TEMPERATURE
from lorapar_ray.grpo.advantages import group_advantages, overlong_penalty
from lorapar_ray.grpo.figures import Part, as_numbers, step_metrics, update_metrics
from lorapar_ray.grpo.loss import LossType, part_weight, policy_loss
from lorapar_ray.grpo.packing import group_by_prompt, micro_batches
from lorapar_ray.grpo.samples import Sample
from lorapar_ray.logprobs import token_logprobs

B, T, LOW, HIGH, LENGTH, TOKENS = 6, 9, 0.2, 0.28, 12, 31


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    draw = {name: torch.randn(B, T, generator=generator, dtype=torch.float64) for name in ("old", "ref", "step", "gap")}
    old = -draw["old"].abs() - 0.1
    lengths = torch.tensor([9, 7, 4, 9, 1, 5])
    return {
        "logprobs": (old + 0.4 * draw["step"]).requires_grad_(),
        "old": old,
        "ref": old + 0.3 * draw["ref"],
        "sampling": old + 0.5 * draw["gap"],
        "advantages": torch.tensor([1.5, -0.7, 0.3, -1.2, 0.9, -0.4], dtype=torch.float64),
        "mask": (torch.arange(T) < lengths[:, None]).double(),
    }


def trl_loss(data: dict[str, torch.Tensor], loss_type: str, level: str, beta: float, cap: float | None) -> torch.Tensor:
    """TRL's code on our tensors; parts of the trainer that the loss does not read are fakes."""
    from trl.trainer.grpo_trainer import GRPOTrainer  # it imports vLLM

    trainer: Any = MagicMock()
    trainer._get_per_token_logps_and_entropies.return_value = (data["logprobs"], torch.zeros(B, T), None)
    trainer.loss_type, trainer.importance_sampling_level, trainer.beta = loss_type, level, beta
    trainer.epsilon_low, trainer.epsilon_high, trainer.max_completion_length = LOW, HIGH, LENGTH
    trainer.top_entropy_quantile, trainer.off_policy_mask_threshold = 1.0, None
    trainer.aux_loss_enabled = trainer._entropy_bonus_enabled = False
    trainer.args.delta, trainer.args.use_bias_correction_kl, trainer.args.steps_per_generation = None, False, 1
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = cap is not None
    trainer.model.training, trainer.current_gradient_accumulation_steps = True, 1
    trainer.accelerator.num_processes = 1
    trainer.accelerator.gather.side_effect = lambda value: value
    inputs = {
        "prompt_ids": torch.zeros(B, 2, dtype=torch.long),
        "prompt_mask": torch.ones(B, 2),
        "completion_ids": torch.zeros(B, T, dtype=torch.long),
        "completion_mask": data["mask"],
        "advantages": data["advantages"],
        "old_per_token_logps": data["old"],
        "ref_per_token_logps": data["ref"],
        "num_items_in_batch": torch.tensor(float(TOKENS)),
        "importance_sampling_ratio": (data["old"] - data["sampling"]).exp().clamp(max=cap or math.inf),
        "sampling_per_token_logps": data["sampling"],
    }
    loss: torch.Tensor = GRPOTrainer._compute_loss(trainer, None, inputs)
    return loss


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("cap", [None, 1.3])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "bnpo", "dr_grpo", "cispo", "gspo"])
def test_loss_and_gradient_equal_trl(loss_type: Any, cap: float | None, beta: float) -> None:
    data = tensors()
    sequence = loss_type == "gspo"
    theirs = trl_loss(data, "grpo" if sequence else loss_type, "sequence" if sequence else "token", beta, cap)
    (their_gradient,) = torch.autograd.grad(theirs, data["logprobs"])
    ours = policy_loss(
        data["logprobs"],
        data["old"],
        data["advantages"],
        data["mask"],
        loss_type=loss_type,
        clip_low=LOW,
        clip_high=HIGH,
        max_completion_length=LENGTH,
        num_tokens_global=TOKENS,
        ref_logprobs_BT=data["ref"],
        kl_beta=beta,
        sampling_logprobs_BT=None if cap is None else data["sampling"],
        tis_cap=cap,
    ).loss
    (our_gradient,) = torch.autograd.grad(ours, data["logprobs"])
    assert torch.allclose(ours, theirs, rtol=1e-6, atol=0)
    assert (our_gradient - their_gradient).norm() <= 1e-6 * their_gradient.norm()


def test_sampler_ratios_are_logged_raw_and_far_sequences_masked() -> None:
    old = torch.log(torch.tensor([[0.5, 0.5], [0.5, 0.5]]))
    sampling = torch.log(torch.tensor([[0.5, 0.25], [0.05, 0.05]]))
    out = policy_loss(
        old,
        old,
        torch.tensor([1.0, 1.0]),
        torch.ones(2, 2),
        loss_type="bnpo",
        sampling_logprobs_BT=sampling,
        tis_cap=1.5,
        sequence_mask_bounds=(0.1, 5.0),
    )
    assert out.loss.item() == pytest.approx(-(1.0 + 1.5) / 4)  # over all tokens, dropped ones included
    figures = as_numbers(out.figures)
    assert figures["ratio_max"] == pytest.approx(10.0)
    assert figures["sequence_masked_share"] == 0.5


@pytest.mark.parametrize("from_sampler", [False, True])
def test_a_sequence_far_from_the_sampler_is_dropped_under_either_old_policy(from_sampler: bool) -> None:
    learner = torch.full((2, 3), -1.0, requires_grad=True)
    sampling = torch.tensor([[-4.0] * 3, [-1.1] * 3])
    out = policy_loss(
        learner,
        None if from_sampler else learner.detach(),
        torch.tensor([-1.0, -1.0]),
        torch.ones(2, 3),
        sampling_logprobs_BT=sampling,
        tis_cap=2.0,
        sequence_mask_bounds=(0.5, 2.0),
    )
    (gradient,) = torch.autograd.grad(out.loss, learner)
    assert gradient[0].tolist() == [0.0] * 3 and (gradient[1] > 0).all()
    figures = as_numbers(out.figures)
    assert figures["sequence_masked_share"] == 0.5
    assert figures["logprob_gap"] == pytest.approx((3.0 + 0.1) / 2)


def test_clip_shares_count_only_where_clipping_bites() -> None:
    old = torch.zeros(2, 2)
    new = torch.log(torch.tensor([[2.0, 0.1], [2.0, 0.1]]))
    figures = as_numbers(policy_loss(new, old, torch.tensor([1.0, -1.0]), torch.ones(2, 2)).figures)
    assert (figures["clip_high_share"], figures["clip_low_share"]) == (0.25, 0.25)


def test_advantages_by_hand() -> None:
    rewards = torch.tensor([1.0, 0.0, 1.0, 0.0, 2.0, 2.0, 2.0, 2.0])
    assert group_advantages(rewards, 4, "none").tolist() == [0.5, -0.5, 0.5, -0.5, 0, 0, 0, 0]
    assert group_advantages(rewards, 4)[0].item() == pytest.approx(0.5 / (math.sqrt(1 / 3) + 1e-4))
    assert group_advantages(rewards, 4, "batch")[0].item() == pytest.approx(0.5 / (rewards.std().item() + 1e-4))
    with pytest.raises(ValueError, match="groups of 3"):
        group_advantages(rewards, 3)


def test_a_single_sample_of_a_group_has_no_advantage() -> None:
    assert group_advantages(torch.tensor([1.0, 1.0, 0.0]), [1, 2]).tolist()[0] == 0
    assert group_advantages(torch.tensor([1.0]), [1], "batch").tolist() == [0]


def test_overlong_penalty_is_soft_then_full() -> None:
    assert [overlong_penalty(length, 10, 2) for length in (5, 8, 9, 10, 12)] == [0, 0, -0.5, -1, -1]


def test_the_least_temperature_is_the_engines() -> None:
    from vllm import SamplingParams

    assert SamplingParams(temperature=LEAST_TEMPERATURE).temperature == LEAST_TEMPERATURE
    assert SamplingParams(temperature=LEAST_TEMPERATURE / 2).temperature == LEAST_TEMPERATURE


def test_token_logprobs_are_those_of_the_tempered_distribution() -> None:
    logits, tokens = torch.randn(2, 3, 7), torch.tensor([[1, 2, 3], [4, 5, 6]])
    logprobs, entropy = token_logprobs(logits, tokens, temperature=0.7)
    reference = torch.distributions.Categorical(logits=logits / 0.7)
    torch.testing.assert_close(logprobs, reference.log_prob(tokens))
    torch.testing.assert_close(entropy, reference.entropy())


def samples() -> list[Sample]:
    draw = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(3, 96, (count,), generator=draw).tolist()

    prompts = [ids(5), ids(8), ids(3)]
    lengths = [(4, 1, 3), (2, 6, 2), (1, 1, 5)]
    return [
        Sample(prompt, ids(length), [-1.0] * length, 0.5, True, 0)
        for prompt, group in zip(prompts, lengths, strict=True)
        for length in group
    ]


def test_token_logprobs_have_autograds_gradients_slice_by_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(logprobs.SLICE, "cpu", 14)  # two rows at a time of the five
    logits, tokens, weight = torch.randn(5, 7), torch.tensor([1, 2, 3, 6, 0]), torch.randn(5)
    ours, plain = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    (token_logprobs(ours, tokens, temperature=0.7)[0] * weight).sum().backward()
    ((plain / 0.7).log_softmax(-1)[range(5), tokens] * weight).sum().backward()
    torch.testing.assert_close(ours.grad, plain.grad, atol=1e-6, rtol=1e-5)
    assert torch.equal(ours, logits)


def test_micro_batches_keep_groups_whole_unless_they_are_larger() -> None:
    groups = group_by_prompt(samples())  # of 5 + 8, 8 + 10 and 3 + 7 tokens
    for tokens, sequences, sizes in (
        (1000, 6, [6, 3]),
        (1000, 2, [2, 1, 2, 1, 2, 1]),
        (31, None, [6, 3]),
        (10, None, [2, 1, 1, 1, 1, 3]),
    ):
        parts = list(micro_batches(groups, tokens, sequences))
        assert [sum(map(len, part)) for part in parts] == sizes
        assert [sample for part in parts for piece in part for sample in piece] == samples()


@pytest.mark.parametrize("bounds", [None, (0.9, 1.3)])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo", "bnpo", "gspo", "cispo"])
def test_the_losses_of_parts_add_up_to_that_of_the_step(
    loss_type: LossType, bounds: tuple[float, float] | None
) -> None:
    data = tensors()
    count, tokens = len(data["advantages"]), int(data["mask"].sum())

    dropped: list[float] = []

    def loss(rows: slice) -> torch.Tensor:
        mask = data["mask"][rows]
        output = policy_loss(
            data["logprobs"][rows],
            data["old"][rows],
            data["advantages"][rows],
            mask,
            loss_type=loss_type,
            clip_high=5.0,
            max_completion_length=LENGTH,
            num_tokens_global=tokens,
            sampling_logprobs_BT=data["sampling"][rows],
            sequence_mask_bounds=bounds,
        )
        dropped.append(float(output.figures.get("sequence_masked_share", torch.zeros(()))) * len(mask))
        return output.loss * part_weight(loss_type, len(mask) / count, float(mask.sum()) / tokens)

    parts, whole = loss(slice(0, 2)) + loss(slice(2, None)), loss(slice(None))
    torch.testing.assert_close(parts, whole)
    assert sum(dropped[:2]) == pytest.approx(dropped[2]) and (0 < dropped[2] < count) == (bounds is not None)


def test_metrics_of_parts_are_those_of_the_step() -> None:
    first = {"loss": 1.0, "kl": 1.0, "ratio_max": 2.0, "ratio_min": 0.5, "sequence_masked_share": 1.0}
    parts = [Part(first, 1, 30), Part({"loss": 0.5, "kl": 4.0, "sequence_masked_share": 0.0}, 3, 10)]
    means = {"kl": 1.75, "sequence_masked_share": 0.25}  # over tokens, over samples
    assert update_metrics(parts) == {"loss": 1.5, "ratio_max": 2.0, "ratio_min": 0.5, **means}
    assert step_metrics(parts) == {"loss": 0.75, "ratio_max": 2.0, "ratio_min": 0.5, **means}
    norms = [
        Part({"grad_norm": 1.0, "updates_skipped": 0.0}, 4, 7),
        Part({"grad_norm": 3.0, "updates_skipped": 1.0}, 1, 1),
    ]
    assert step_metrics(norms) == {"grad_norm": 2.0, "updates_skipped": 1.0}
