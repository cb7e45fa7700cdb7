"""The CPU's output head gives what TRL's own gives, at the labels' positions alone."""

from typing import Any

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from transformers import Gemma2Config, Gemma2ForCausalLM
from trl.trainer.utils import add_fused_lm_head

from lorapar_ray.adapters import attach_lora
from lorapar_ray.sft.head import score_labels_only
from tests.unit.tiny_models import GROUPED, SHAPE, tiny

FIELDS = ("log_probs", "entropy", "is_top1")


def batch() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(3, SHAPE["vocab_size"], (3, 11), generator=draw)
    labels = ids.clone()
    labels[0, :7] = labels[1, :3] = labels[2] = -100  # the last row has no loss at all
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def run(model: Any) -> tuple[Any, list[torch.Tensor]]:
    output = model(**batch(), fused_lm_head=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return output, list(torch.autograd.grad(-output.log_probs.sum(), trained))


@pytest.mark.parametrize("name", ["llama", "qwen2_moe", "gpt_neox", "soft cap", "prompt tuning"])
def test_it_equals_trls_head(name: str) -> None:
    capped = Gemma2ForCausalLM(Gemma2Config(**GROUPED, final_logit_softcapping=2.0))
    base = capped if name == "soft cap" else tiny("llama" if name == "prompt tuning" else name)
    add_fused_lm_head(base, outputs=FIELDS)
    if name == "prompt tuning":
        model = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    else:
        model = attach_lora(base, rank=4, alpha=8, init="gaussian")
    theirs, their_gradients = run(model)
    seen = []
    base.get_output_embeddings().register_forward_hook(lambda _, given, __: seen.append(given[0].shape[:2].numel()))
    score_labels_only(base)
    ours, our_gradients = run(model)
    assert seen == [12]
    assert torch.equal(ours.label_mask, theirs.label_mask)
    assert torch.equal(ours.is_top1, theirs.is_top1)
    for field in FIELDS[:2]:
        torch.testing.assert_close(getattr(ours, field), getattr(theirs, field), atol=1e-5, rtol=1e-5)
    for mine, other in zip(our_gradients, their_gradients, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-4)
    plain = model(**{key: value for key, value in batch().items() if key != "labels"})
    assert plain.logits.shape[-1] == SHAPE["vocab_size"]


def test_a_batch_without_labels_has_a_loss_of_zero_with_gradients() -> None:
    base = tiny()
    add_fused_lm_head(base, outputs=FIELDS)
    model = attach_lora(base, rank=4, alpha=8, init="gaussian")
    score_labels_only(base)
    inputs = batch()
    inputs["labels"].fill_(-100)
    output = model(**inputs, fused_lm_head=True)
    output.log_probs.sum().backward()
    assert output.log_probs.sum() == 0
    assert all(not parameter.grad.any() for parameter in model.parameters() if parameter.requires_grad)
