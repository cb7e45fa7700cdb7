"""Stage 1's loop compared with TRL's SFTTrainer, its loss with TRL's head, and its rows."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PromptTuningConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig as TrlConfig
from trl import SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from lorapar_ray.adapters import adapter_parameters, attach_lora
from lorapar_ray.config import SftConfig
from lorapar_ray.errors import UserError
from lorapar_ray.optim import MaskedAdamW, masked_param_groups
from lorapar_ray.sft.arm import Worker
from lorapar_ray.sft.batches import plan_batches
from lorapar_ray.sft.checkpoint import Progress, last_checkpoint, load_checkpoint, save_checkpoint
from lorapar_ray.sft.loop import TrainingLoop
from lorapar_ray.sft.loss import token_losses
from lorapar_ray.sft.passes import EagerPasses, GraphPasses, Passes
from lorapar_ray.sft.rows import bucket, collate, losses_in, rows_in
from lorapar_ray.sft.step_log import StepLog
from lorapar_ray.tracking import keep_lines_until
from tests.tiny_run import metrics
from tests.unit.tiny_models import GROUPED, SHAPE, tiny

SETTINGS = {"batch_size": 6, "micro_batch_size": 3, "epochs": 2, "learning_rate": 1e-2, "weight_decay": 0.1}
CPU = torch.device("cpu")


def examples(count: int = 15) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(1)
    lengths = torch.randint(5, 30, (count,), generator=draw).tolist()
    ids = [torch.randint(3, SHAPE["vocab_size"], (length,), generator=draw).tolist() for length in lengths]
    return [{"input_ids": each, "response_start": 1 + len(each) // 2} for each in ids]


def trained_with(
    folder: Path,
    make: Any = EagerPasses,
    device: torch.device = CPU,
    dropout: float = 0.0,
    validated: bool = False,
    limit: int = 3,
    **changes: Any,
) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """(lines of the metrics file, adapter) of a run of our loop, which resumes from a checkpoint, if any."""
    settings = SftConfig(**{**SETTINGS, "max_length": 32, **changes})
    model = attach_lora(tiny().to(device), rank=4, alpha=8, init="gaussian", dropout=dropout)
    parameters = adapter_parameters(model)
    masks = {key: torch.ones(value.shape, dtype=torch.bool) for key, value in parameters.items()}
    groups = masked_param_groups(parameters, masks, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    rows = examples()
    plan = plan_batches([len(each["input_ids"]) for each in rows], settings, 1, seed=0)
    torch.manual_seed(0)
    passes: Passes = make(model, list(parameters.values()), device)
    found = last_checkpoint(folder / "checkpoints", 1)
    keep_lines_until(folder / "metrics" / "sft.jsonl", 0 if found is None else found[1])
    held_out = [[each] for each in examples(20)[15:]]
    TrainingLoop(
        model,
        MaskedAdamW(groups, lr=settings.learning_rate, weight_decay=settings.weight_decay),
        passes,
        settings=settings,
        plan=plan,
        examples=rows,
        validation=[collate(held_out, packed=False, filler=0)] if validated else [],
        filler=0,
        worker=Worker(0, 1, device),
        checkpoints=folder / "checkpoints",
        log=StepLog(folder / "metrics" / "sft.jsonl", None, 1.0, nonfinite_limit=limit),
    ).run(None if found is None else found[0])
    return metrics(folder, "sft"), {key: value.detach().cpu() for key, value in parameters.items()}


def trained_by_trl(folder: Path, packing: bool) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    settings = SftConfig(**SETTINGS, max_length=32, packing=packing)
    model = attach_lora(tiny(), rank=4, alpha=8, init="gaussian")
    rows = examples()
    plan = plan_batches([len(each["input_ids"]) for each in rows], settings, 1, seed=0)

    def as_trl(row: tuple[int, ...]) -> dict[str, Any]:
        own = [rows[each] for each in row] or [{"input_ids": [0, 0], "response_start": 2}]
        labels = [t for e in own for t in [-100] * e["response_start"] + e["input_ids"][e["response_start"] :]]
        line = {"input_ids": [token for each in own for token in each["input_ids"]], "labels": labels}
        return line | ({"seq_lengths": [len(each["input_ids"]) for each in own]} if packing else {})

    arguments = TrlConfig(
        output_dir=str(folder),
        per_device_train_batch_size=plan.micro_batch,
        gradient_accumulation_steps=plan.accumulation,
        train_sampling_strategy="sequential",
        max_steps=plan.steps,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup_ratio,
        packing=packing,
        max_length=32,
        dataset_kwargs={"skip_prepare_dataset": True},
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
    )
    trainer = SFTTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_list([as_trl(row) for row in plan.rows]),
        processing_class=tokenizer(),
    )  # fmt: skip
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    return lines, {key: value.detach() for key, value in adapter_parameters(model).items()}


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models

    words = {f"w{number}": number for number in range(SHAPE["vocab_size"])}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), pad_token="w0", eos_token="w2"
    )


@pytest.mark.parametrize("packing", [False, True])
def test_losses_norms_and_adapter_are_those_of_trls_trainer(tmp_path: Path, packing: bool) -> None:
    ours, adapter = trained_with(tmp_path, packing=packing)
    theirs, reference = trained_by_trl(tmp_path / "trl", packing)
    assert [line["step"] for line in ours] == list(range(1, 7)) == [line["step"] for line in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert mine["grad_norm"] == pytest.approx(float(other["grad_norm"]), rel=1e-3)
        assert mine["learning_rate"] == pytest.approx(other["learning_rate"])
    for key, value in adapter.items():
        torch.testing.assert_close(value, reference[key], rtol=1e-2, atol=2e-4)


class Killed(BaseException):
    """Raised instead of a kill."""


@pytest.mark.parametrize("at", [1, 4, 5])
def test_an_interrupted_run_resumes_to_the_same_bits(at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout, so that the random generators' states matter."""
    options: dict[str, Any] = {"dropout": 0.2, "checkpoint_every": 2}
    undisturbed, expected = trained_with(tmp_path / "whole", **options)

    def cut_off(loop: TrainingLoop, step: int) -> None:
        if step == at:
            raise Killed
        usual(loop, step)

    usual = TrainingLoop._step
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(TrainingLoop, "_step", cut_off)
        trained_with(tmp_path / "cut", **options)
    lines, adapter = trained_with(tmp_path / "cut", **options)
    assert [line["step"] for line in lines] == list(range(1, 7))
    assert [line["loss"] for line in lines] == [line["loss"] for line in undisturbed]
    for key, value in adapter.items():
        assert torch.equal(value, expected[key]), key
    assert sorted(path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()) == [
        "checkpoint-4",
        "checkpoint-6",
    ]


class Spoilt(EagerPasses):
    """Passes of which some steps give a gradient that is not finite; with several adapters, one of them has it."""

    steps: tuple[int, ...] = ()
    arm = 0

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.step = 0

    def loss(self) -> torch.Tensor:
        self.step += 1
        if self.step in self.steps:
            gradient = self._parameters[2].grad
            assert gradient is not None
            (gradient if self._kept is None else gradient[self.arm]).view(-1)[3] = torch.inf
        return super().loss()


def spoilt(*steps: int, arm: int = 0) -> type[Spoilt]:
    """Of these steps, from 1."""
    return type("Spoilt", (Spoilt,), {"steps": steps, "arm": arm})


def test_a_step_whose_gradient_is_not_finite_is_skipped_and_counted(tmp_path: Path) -> None:
    lines, adapter = trained_with(tmp_path, spoilt(3, 4, 6), checkpoint_every=1, keep="last", epochs=3)
    assert [line["step"] for line in lines] == list(range(1, 10))
    assert [line["step"] for line in lines if line["updates_skipped"]] == [3, 4, 6]
    assert ["grad_norm" in line for line in lines] == [not line["updates_skipped"] for line in lines]
    assert all("loss" in line and math.isfinite(line["loss"]) for line in lines)
    assert all(value.isfinite().all() for value in adapter.values())

    _, early = trained_with(tmp_path / "early", epochs=3, max_steps=2, schedule="constant")
    _, late = trained_with(tmp_path / "late", spoilt(3, 4), epochs=3, max_steps=4, schedule="constant")
    for key, value in early.items():
        assert torch.equal(value, late[key]), key


def test_too_many_skipped_steps_in_a_row_end_the_run(tmp_path: Path) -> None:
    refusal = (
        r"^sft: the gradient was not finite in 2 steps in a row \(step 4: loss [\d.]+, gradient norm inf\); lower "
        r"sft.learning_rate, set model.dtype: float32, or check the base's weights$"
    )
    with pytest.raises(UserError, match=refusal):
        trained_with(tmp_path, spoilt(1, 3, 4), limit=2)
    lines = metrics(tmp_path, "sft")
    assert [(line["step"], line["updates_skipped"]) for line in lines] == [(1, 1), (2, 0), (3, 1), (4, 1), (5, 0)]
    with pytest.raises(UserError, match="in 3 steps in a row"):  # the last three: seen before the adapter is saved
        trained_with(tmp_path / "last", spoilt(4, 5, 6))


def test_the_best_checkpoint_is_kept_and_patience_ends_the_run(tmp_path: Path) -> None:
    options: dict[str, Any] = {"schedule": "constant", "warmup_ratio": 0.0, "validation": 0.2, "validate_every": 1}
    _, adapter = trained_with(tmp_path / "a", validated=True, epochs=20, patience=2, learning_rate=0.3, **options)
    losses = {line["step"]: line["loss"] for line in metrics(tmp_path / "a", "sft_validation")}
    best = min(losses, key=lambda step: losses[step])
    assert max(losses) == best + 2 < 60, losses
    last = {"max_steps": best, "keep": "last", "learning_rate": 0.3}
    _, expected = trained_with(tmp_path / "b", validated=True, **last, **options)
    for key, value in adapter.items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize("name", ["llama", "qwen2_moe", "gpt_neox", "soft cap", "prompt tuning"])
def test_the_loss_is_that_of_trls_head_and_the_head_sees_what_it_needs(name: str) -> None:
    capped = Gemma2ForCausalLM(Gemma2Config(**GROUPED, final_logit_softcapping=2.0))
    base = capped if name == "soft cap" else tiny("llama" if name == "prompt tuning" else name)
    add_fused_lm_head(base, outputs=("log_probs",))
    if name == "prompt tuning":
        model = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    else:
        model = attach_lora(base, rank=4, alpha=8, init="gaussian")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rows = collate([[each] for each in examples(3)] + [[]], packed=False, filler=0)
    labels = torch.full_like(rows.input_ids, -100)
    labels.view(-1)[rows.places + 1] = rows.targets
    lengths = torch.tensor([*(len(each["input_ids"]) for each in examples(3)), 2])
    mask = (torch.arange(rows.input_ids.shape[1]) < lengths[:, None]).long()
    output = model(input_ids=rows.input_ids, attention_mask=mask, labels=labels, fused_lm_head=True)
    expected = -output.log_probs.sum()
    their_gradients = torch.autograd.grad(expected, trained)
    seen: list[int] = []
    base.get_output_embeddings().register_forward_hook(lambda _, given, __: seen.append(given[0].shape[:2].numel()))
    loss = token_losses(model, rows).sum()
    torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=1e-4)
    assert seen == [losses_in(examples(3))] == [len(rows.targets)]
    for mine, other in zip(torch.autograd.grad(loss, trained), their_gradients, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-3)


def test_rows_without_a_loss_give_gradients_of_zero() -> None:
    model = attach_lora(tiny(), rank=4, alpha=8, init="gaussian")
    parameters = list(adapter_parameters(model).values())
    passes = EagerPasses(model, parameters, CPU)
    passes.begin(0)
    passes.add(collate([[], []], packed=False, filler=0))
    assert passes.loss() == 0
    assert all(not parameter.grad.any() for parameter in parameters if parameter.grad is not None)


@pytest.mark.parametrize("packed", [False, True])
def test_buckets_change_no_loss_and_no_gradient(packed: bool) -> None:
    model = attach_lora(tiny(), rank=4, alpha=8, init="gaussian")
    parameters = list(adapter_parameters(model).values())
    layout = [examples(5)[:2], examples(5)[2:4], []] if packed else [[each] for each in examples(4)]
    found = []
    for buckets in (0, 4):
        rows = collate(layout, packed=packed, filler=0, buckets=buckets)
        loss = token_losses(model, rows).sum()
        found.append((loss, torch.autograd.grad(loss, parameters), rows))
    (loss, gradients, rows), (padded, others, wide) = found
    torch.testing.assert_close(loss, padded)
    for mine, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    assert wide.input_ids.shape[1] == bucket(rows.input_ids.shape[1], 4)
    assert len(wide.targets) == bucket(len(rows.targets), 1)
    assert int(wide.weights.sum()) == len(rows.targets) == losses_in([each for row in layout for each in row])
    again = rows_in(torch.cat([tensor.flatten() for tensor in wide.tensors()]), wide.shape)
    assert all(torch.equal(a, b) for a, b in zip(again.tensors(), wide.tensors(), strict=True))


def test_buckets_are_few_and_waste_at_most_a_part() -> None:
    for parts, most in ((1, 9), (4, 28), (8, 48)):
        sizes = sorted({bucket(size, parts) for size in range(1, 4097)})
        assert sizes[:2] == [16, 32] and sizes[-1] == 4096 and len(sizes) == most
        for size in range(1, 4097):
            assert size <= bucket(size, parts) <= max(size + 15, (1 + 1 / parts) * size), size
    assert [bucket(size, 4) for size in (129, 160, 161, 256, 257, 512)] == [160, 160, 192, 256, 320, 512]


class Counted(EagerPasses):
    """Keeps the shapes of its rows; as a graph's, they are filled up."""

    buckets = 4

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.shapes: list[Any] = []

    def add(self, rows: Any) -> None:
        self.shapes.append(rows.shape)
        super().add(rows)


def test_only_graphs_fill_rows_up(tmp_path: Path) -> None:
    """Without graphs a new shape costs nothing, and padding does; the losses are the same."""
    made: list[Counted] = []

    def counted(buckets: int) -> Any:
        def make(*arguments: Any) -> Counted:
            made.append(type("Made", (Counted,), {"buckets": buckets})(*arguments))
            return made[-1]

        return make

    filled, adapter = trained_with(tmp_path / "filled", counted(4))
    plain, expected = trained_with(tmp_path / "plain", counted(EagerPasses(None, [], CPU).buckets))
    wide, own = ({shape[1] for shape in each.shapes} for each in made)
    assert wide == {32} and len(own) > 2 and not own <= wide
    for mine, other in zip(filled, plain, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-4)
    for key, value in adapter.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-2, atol=1e-3)


def test_a_large_model_gets_finer_buckets_than_a_small_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.Stream", lambda _: None)
    monkeypatch.setattr("torch.cuda.graph_pool_handle", lambda: None)
    with torch.device("meta"):
        models = [torch.nn.Linear(width, width, bias=False) for width in (1_000, 40_000)]
    assert [GraphPasses(each, [], CPU).buckets for each in models] == [4, 8]


def test_checkpoints_of_transformers_trainer_are_resumed_from(tmp_path: Path) -> None:
    value = torch.nn.Parameter(torch.ones(4))
    optimizer = MaskedAdamW([value])
    save_checkpoint(tmp_path, 0, 1, Progress(7, 1.5, "somewhere", 2), {"a": value}, optimizer)
    folder = tmp_path / "checkpoint-7"
    state = (folder / "trainer_state.json").read_text()
    (folder / "trainer_state.json").write_text(
        state.replace("{", '{"log_history": [], "is_world_process_zero": true,', 1)
    )
    with torch.no_grad():
        value.zero_()
    best = str(tmp_path / "somewhere")  # next to the checkpoint, even if the run has moved
    assert load_checkpoint(folder, 0, {"a": value}, optimizer) == Progress(7, 1.5, best, 2)
    assert load_checkpoint(folder, 3, {"a": value}, optimizer).step == 7  # a worker that was not there before
    assert value.detach().tolist() == [1.0] * 4


class Operations(TorchDispatchMode):
    """Names of the operations that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(function).removeprefix("aten.").split(".")[0])
        return function(*args, **(kwargs or {}))


WAITS = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "lift_fresh", "_assert_async", "equal", "unique"}
"""Operations that wait for the device, or copy a constant from pageable memory to it: none may be in a graph."""


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt_neox"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_pass_never_waits_for_the_device(family: str, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.utils.import_utils.is_cuda_stream_capturing", lambda: packed)
    base = tiny(family, attention="sdpa", dtype=torch.bfloat16)
    model = attach_lora(base, rank=4, alpha=8, init="gaussian").train()
    layout = [examples(4)[:2], examples(4)[2:]] if packed else [[each] for each in examples(4)]
    rows = collate(layout, packed=packed, filler=0, buckets=4)
    with Operations() as operations:
        token_losses(model, rows).sum().backward()
    assert "mm" in operations.names
    assert not WAITS & set(operations.names)
    masked = {"bitwise_and", "le"} & set(operations.names)  # a mask of all pairs of tokens
    assert bool(masked) == packed or family == "gemma3"  # whose window may need one


@pytest.mark.gpu
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("packing", [False, True])
def test_graphs_give_the_losses_of_launching_one_by_one(tmp_path: Path, packing: bool, dropout: float) -> None:
    device, made = torch.device("cuda"), []

    def graphs(*arguments: Any) -> GraphPasses:
        made.append(GraphPasses(*arguments))
        return made[0]

    ours, adapter = trained_with(tmp_path / "graphs", graphs, device, dropout, packing=packing)
    theirs, reference = trained_with(tmp_path / "eager", EagerPasses, device, dropout, packing=packing)
    assert made[0].capturing
    assert made[0].captured > 0
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=0.2 if dropout else 1e-4)
    if not dropout:
        for key, value in adapter.items():
            torch.testing.assert_close(value, reference[key], rtol=1e-2, atol=1e-3)


def test_a_steps_seconds_end_where_its_figures_were_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("lorapar_ray.sft.step_log.time.monotonic", lambda: now[0])
    log = StepLog(tmp_path / "steps.jsonl", None, 1.0)
    for step, ended in enumerate((10.0, 12.0, 15.0), start=1):
        now[0] = ended
        log.put(step, torch.tensor(1.0), torch.tensor(1.0), 1e-3, tokens=60)
    log.flush()  # at once, as before a checkpoint
    lines = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert [line["seconds"] for line in lines] == [10, 2, 3]
    assert [line["tokens_per_s"] for line in lines] == [6, 30, 20]
