"""What replaces parts of vLLM's CPU path samples the same distribution and computes the same head."""

from types import SimpleNamespace

import torch
from torch.nn import functional

from lorapar_ray.cpu.engine import Float32Head, draw, lighten, sample_and_logprobs


def seeded(rows: int, seed: int = 0) -> dict[int, torch.Generator]:
    return {row: torch.Generator().manual_seed(seed + row) for row in range(rows)}


def test_tokens_come_as_often_as_their_probabilities_say() -> None:
    shares = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.0, 0.05])
    rows = 20_000
    tokens = draw(shares.log().expand(rows, -1), {0: torch.Generator().manual_seed(1)})
    counts = tokens.bincount(minlength=len(shares))
    error = 4 * (rows * shares * (1 - shares)).sqrt()
    assert ((counts - rows * shares).abs() <= error).all()
    assert counts[1] == counts[4] == 0


def test_a_seeded_row_does_not_depend_on_its_companions() -> None:
    logits = torch.randn(5, 1000, generator=torch.Generator().manual_seed(0))
    together, _ = sample_and_logprobs(logits.clone(), seeded(5), None, None)
    alone = [sample_and_logprobs(logits[row : row + 1], {0: seeded(5)[row]}, None, None)[0] for row in range(5)]
    assert together.tolist() == [int(token) for token in alone]


def test_log_probabilities_are_those_of_the_distribution_drawn_from() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    _, logprobs = sample_and_logprobs(logits.clone(), {}, None, None)
    torch.testing.assert_close(logprobs, logits.log_softmax(-1))


def test_the_head_is_cast_again_when_it_has_changed() -> None:
    head, weight = Float32Head(), torch.randn(7, 4).bfloat16()
    hidden, layer = torch.randn(2, 4).bfloat16(), SimpleNamespace(weight=weight)
    for _ in range(2):
        assert torch.equal(head(layer, hidden, None), functional.linear(hidden.float(), weight.float()))
    kept = head._weight
    head(layer, hidden, None)
    assert head._weight is kept
    weight.mul_(2)
    assert torch.equal(head(layer, hidden, None), functional.linear(hidden.float(), weight.float()))


def test_a_model_runner_without_these_parts_is_left_alone() -> None:
    lighten(SimpleNamespace())
    other = SimpleNamespace(topk_topp_sampler=SimpleNamespace(logprobs_mode="raw_logprobs", forward="theirs"))
    lighten(SimpleNamespace(sampler=other, model=SimpleNamespace(logits_processor=SimpleNamespace(head_dtype=None))))
    assert other.topk_topp_sampler.forward == "theirs"
