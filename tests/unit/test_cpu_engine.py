"""The replacements for parts of vLLM's CPU path sample the same distribution and compute the same head."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from lorapar_ray.cpu.engine import SCORED_FROM, Float32Head, WantedPromptLogprobs, draw, lighten, sample_and_logprobs


def seeded(rows: int, seed: int = 0) -> dict[int, torch.Generator]:
    return {row: torch.Generator().manual_seed(seed + row) for row in range(rows)}


def test_tokens_are_sampled_by_their_probabilities() -> None:
    shares = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.0, 0.05])
    rows = 20_000
    tokens = draw(shares.log().expand(rows, -1), {0: torch.Generator().manual_seed(1)})
    counts = tokens.bincount(minlength=len(shares))
    error = 4 * (rows * shares * (1 - shares)).sqrt()
    assert ((counts - rows * shares).abs() <= error).all()
    assert counts[1] == counts[4] == 0


def test_a_seeded_row_does_not_depend_on_other_rows() -> None:
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


@pytest.mark.slow
def test_only_wanted_log_probabilities_of_prompts_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's function on a runner with three requests in a step; the third is computed in two parts."""
    from vllm.v1.sample.sampler import Sampler
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    monkeypatch.setattr(torch._dynamo.config, "disable", True)
    vocabulary, torch_seed = 11, torch.Generator().manual_seed(0)
    prompts = {"a": 5, "b": 4, "c": 7}
    wanted = {"a": 3, "c": 6}
    ids = {
        name: torch.randint(vocabulary, (length,), generator=torch_seed).tolist() for name, length in prompts.items()
    }
    hidden = {name: torch.randn(length, vocabulary, generator=torch_seed) for name, length in prompts.items()}
    computed: list[int] = []

    def head(rows: torch.Tensor) -> torch.Tensor:
        computed.append(len(rows))
        return rows

    def step(function: Any, runner: Any, scheduled: dict[str, int]) -> dict[str, Any]:
        states = [runner.requests[name] for name in scheduled]
        begin = [state.num_computed_tokens for state in states]
        rows = [hidden[name][at : at + count] for (name, count), at in zip(scheduled.items(), begin, strict=True)]
        runner.query_start_loc = SimpleNamespace(np=np.cumsum([0, *scheduled.values()]))
        runner.input_batch = SimpleNamespace(req_id_to_index={name: place for place, name in enumerate(scheduled)})
        found: dict[str, Any] = function(torch.cat(rows), scheduled)
        assert [state.num_computed_tokens for state in states] == begin
        for state, count in zip(states, scheduled.values(), strict=True):
            state.num_computed_tokens += count
        return found

    def runner() -> Any:
        made = SimpleNamespace(
            num_prompt_logprobs=dict.fromkeys(prompts, 0),
            requests={
                name: SimpleNamespace(
                    prompt_token_ids=ids[name],
                    num_computed_tokens=0,
                    in_progress_prompt_logprobs_cpu=None,
                    sampling_params=SimpleNamespace(extra_args={SCORED_FROM: wanted[name]} if name in wanted else None),
                )
                for name in prompts
            },
            device=torch.device("cpu"),
            model=SimpleNamespace(compute_logits=head),
            model_config=SimpleNamespace(logprobs_mode="processed_logprobs"),
            sampler=Sampler(logprobs_mode="processed_logprobs"),
            _sync_device=lambda: None,
        )
        made._get_prompt_logprobs_dict = partial(GPUModelRunner._get_prompt_logprobs_dict, made)
        return made

    steps = ({"a": 5, "b": 4, "c": 3}, {"c": 4})
    theirs = runner()
    whole = [step(theirs._get_prompt_logprobs_dict, theirs, scheduled) for scheduled in steps]
    assert sum(computed) == 4 + 3 + 6
    computed.clear()
    ours = runner()
    parts = [step(WantedPromptLogprobs(ours), ours, scheduled) for scheduled in steps]
    assert sum(computed) == 2 + 3 + 1
    assert [set(part) for part in parts] == [set(part) for part in whole] == [{"a", "b"}, {"c"}]
    for part, full in zip(parts, whole, strict=True):
        for name, tensors in part.items():
            first = wanted.get(name, 1) - 1
            assert torch.equal(tensors.logprobs[first:], full[name].logprobs[first:])
            assert torch.equal(tensors.selected_token_ranks[first:], full[name].selected_token_ranks[first:])
    assert ours.num_prompt_logprobs == theirs.num_prompt_logprobs == {}
