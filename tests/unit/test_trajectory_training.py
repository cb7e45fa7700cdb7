"""Which tokens of trajectories the learner trains on, and how it batches them; its model is real."""

import torch

from lorapar_ray.config import GrpoConfig
from lorapar_ray.grpo.advantages import group_advantages
from lorapar_ray.grpo.batches import make_batch, mini_batches, shares_of
from lorapar_ray.grpo.environments import Trajectory, Turn
from lorapar_ray.grpo.environments.calculator import rollout as calculator
from lorapar_ray.grpo.environments.trajectory import Limits, as_record
from lorapar_ray.grpo.groups import Group
from lorapar_ray.grpo.head import TokenScorer
from lorapar_ray.grpo.packing import micro_batches, pack, packed_logprobs, pad
from lorapar_ray.grpo.rewards import RewardBatch
from lorapar_ray.grpo.samples import Sample
from lorapar_ray.packed_attention import use_packed_attention
from tests.unit.faked_engine import Engine, played
from tests.unit.test_packed_learner import CPU, frozen_head
from tests.unit.tiny_models import tiny


def test_an_environments_tokens_are_read_but_neither_predicted_nor_counted() -> None:
    model = frozen_head(tiny())
    trajectories = []
    for said in ((9, 8), (30, 31, 32)):
        trajectory = Trajectory([5, 6, 7], Limits(16, 64, 96))
        for turn in (said, said[::-1]):
            trajectory.take(turn, [-1.0] * len(turn), Turn(list(turn), True, 0))
            trajectory.add([40, 41])
        trajectory.reward = float(len(said))
        trajectories.append(trajectory)
    record = as_record(trajectories, [])
    group = Group(0, record, record.head)
    group.take(RewardBatch([2.0, 3.0], {"r": [2.0, 3.0]}, {}), GrpoConfig())
    batch = make_batch([group], [], [0], 1, {}, [{"prompt": "", "answer": ""}])
    assert (batch.metrics["completion_length"], batch.metrics["trajectory_length"]) == (5, 7)
    [share] = shares_of(batch, 1, GrpoConfig(group_size=2))
    [update] = mini_batches(share, {0: record})
    assert update.tokens == share.tokens == 10 and [each.count for each in update.samples] == [4, 6]
    expected = []
    for sample in update.samples:
        ids = [*sample.prompt_ids.tolist(), *sample.token_ids.tolist()]
        logprobs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        whole = logprobs[torch.arange(len(ids) - 1), torch.tensor(ids[1:])][len(sample.prompt_ids) - 1 :]
        expected.append(whole[torch.from_numpy(sample.sampled)])
    expected_BT = torch.nn.utils.rnn.pad_sequence(expected, batch_first=True)
    for packed in (False, True):
        assert not packed or use_packed_attention(model)
        rows = pack([update.samples], CPU) if packed else pad(update.samples, 0, CPU)
        found_BT, _ = packed_logprobs(TokenScorer(model), rows, temperature=1.0)
        torch.testing.assert_close(found_BT, expected_BT, atol=2e-5, rtol=1e-4)
        assert rows.mask_BT.sum(1).tolist() == [4, 6] and rows.tokens_N.tolist() == [9, 8, 8, 9, 30, 31, 32, 32, 31, 30]
        assert not set(rows.tokens_N.tolist()) & {40, 41}


def test_samples_without_a_common_prompt_are_packed() -> None:
    """Two groups: the one without a common prompt may be the row's first, or follow another."""
    records = []
    for prompts in (([5, 6], [7, 8]), ([9, 6], [9, 8]), ([11], [12, 13])):
        trajectories = [Trajectory(prompt, Limits(16, 64, 96)) for prompt in prompts]
        for number, trajectory in enumerate(trajectories):
            said = [30, 31, 32][: number + 1]
            trajectory.take(said, [-1.0] * len(said), Turn(said, True, 0))
        records.append(as_record(trajectories, []))
    assert [record.head.prompt_tokens for record in records] == [0, 1, 0]
    groups = []
    for record in records:
        found = zip(record.completions(), record.masks(), strict=True)
        groups.append([Sample(record.prompt_ids, *one, 1.0, True, 0, sampled) for one, sampled in found])
    padded = pad([sample for group in groups for sample in group], 0, CPU)
    packed = pack(groups, CPU)
    model = frozen_head(tiny())
    expected, _ = packed_logprobs(TokenScorer(model), padded, temperature=1.0)
    assert use_packed_attention(model)
    ours, _ = packed_logprobs(TokenScorer(model), packed, temperature=1.0)
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-4)
    assert packed.tokens_N.tolist() == padded.tokens_N.tolist() == [30, 30, 31] * 3


def test_tokens_of_a_samples_own_prompt_are_no_part_of_its_length() -> None:
    limits, trajectories = Limits(prompt=16, completion=10, vocabulary=96), []
    for first, said in ((5, [30, 31]), (6, [30, 31, 32, 33, 34, 35, 36, 37, 38, 39])):
        trajectory = Trajectory([first, *range(10, 18)], limits)
        trajectory.take(said, [-1.0] * len(said), Turn(said, True, 0))
        trajectories.append(trajectory)
    record = as_record(trajectories, [])
    assert record.head.lengths == (11, 19) and record.head.answers == (2, 10)
    group = Group(0, record, record.head)
    group.take(RewardBatch([1.0, 1.0], {}, {}), GrpoConfig(max_completion_length=10, overlong_cache=2))
    assert group.rewards == [1.0, 0.0] and group.parts["overlong"] == [0.0, -1.0]
    assert make_batch([group], [], [0], 1, {}, [{"prompt": "", "answer": ""}]).metrics["trajectory_length"] == 6


def test_a_budget_smaller_than_a_sample_gives_each_sample_a_pass() -> None:
    record = played(calculator, Engine("<calc>12 * 7</calc>", "so 84.<|im_end|>"), samples=3)
    group = Group(0, record, record.head)
    group.take(RewardBatch([1.0, 2.0, 3.0], {"r": [1.0, 2.0, 3.0]}, {}), GrpoConfig())
    batch = make_batch([group], [], [0], 1, {}, [{"prompt": "", "answer": ""}])
    [share] = shares_of(batch, 1, GrpoConfig(group_size=3))
    [update] = mini_batches(share, {0: record})
    passes = list(micro_batches([update.samples], tokens=1))
    assert [[len(piece) for piece in each] for each in passes] == [[1]] * 3
    assert [piece[0] for [piece] in passes] == list(update.samples)


def test_advantages_use_the_remaining_samples() -> None:
    rewards = torch.tensor([1.0, 0.0, 3.0, 1.0, 2.0])
    found = group_advantages(rewards, [2, 3])
    torch.testing.assert_close(found, torch.cat([group_advantages(rewards[:2], 2), group_advantages(rewards[2:], 3)]))
    assert group_advantages(torch.zeros(0), []).tolist() == []
