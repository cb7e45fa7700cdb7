"""Several adapters trained on one frozen base end like each one trained alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorapar_ray.adapters import adapter_parameters, adapter_state, attach_lora
from lorapar_ray.adapters.many import ManyAdapters
from lorapar_ray.config import SftConfig
from lorapar_ray.optim import MaskedAdamW, masked_param_groups
from lorapar_ray.sft.arm import Arm, Micro, Worker
from lorapar_ray.sft.arms_loop import ArmsLoop
from lorapar_ray.sft.batches import plan_batches
from lorapar_ray.sft.checkpoint import last_checkpoint
from lorapar_ray.sft.loop import TrainingLoop
from lorapar_ray.sft.loss import arm_losses, token_losses
from lorapar_ray.sft.passes import EagerPasses, GraphPasses
from lorapar_ray.sft.rows import collate, rows_in
from lorapar_ray.sft.step_log import StepLog
from lorapar_ray.tracking import keep_lines_until
from tests.tiny_run import metrics
from tests.unit.test_sft_loop import CPU, SETTINGS, Killed, examples, spoilt
from tests.unit.tiny_models import tiny

RANK, ALPHA = 4, 8.0
WORKER = Worker(0, 1, CPU)


@dataclass(frozen=True)
class Trial:
    """The parts of one arm."""

    name: str
    seed: int
    share: float
    """Share of elements that its mask trains."""
    init: str = "gaussian"
    rows: int = 15
    settings: dict[str, Any] | None = None

    @property
    def config(self) -> SftConfig:
        return SftConfig(**{**SETTINGS, "max_length": 32, **(self.settings or {})})

    def state(self) -> dict[str, Tensor]:
        return adapter_state(attach_lora(tiny(), rank=RANK, alpha=ALPHA, init=self.init, seed=self.seed, init_std=0.05))

    def masks(self) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(self.seed)
        return {key: torch.rand(value.shape, generator=draw) < self.share for key, value in self.state().items()}

    def parts(self, folder: Path) -> dict[str, Any]:
        """Arguments that a loop and an arm share."""
        rows = examples(self.rows)
        found = last_checkpoint(folder / "checkpoints", 1)
        keep_lines_until(folder / "metrics" / "sft.jsonl", 0 if found is None else found[1])
        return {
            "settings": self.config,
            "plan": plan_batches([len(each["input_ids"]) for each in rows], self.config, 1, seed=self.seed),
            "examples": rows,
            "worker": WORKER,
            "checkpoints": folder / "checkpoints",
            "log": StepLog(folder / "metrics" / "sft.jsonl", None, 1.0),
        }

    def optimizer(self, parameters: Any) -> MaskedAdamW:
        rate, decay = self.config.learning_rate, self.config.weight_decay
        return MaskedAdamW(
            masked_param_groups(parameters, self.masks(), lr=rate, weight_decay=decay), lr=rate, weight_decay=decay
        )

    def validation(self) -> list[Micro]:
        held_out = [[each] for each in examples(15 + self.seed)[12:]]
        return [held_out[:3], held_out[3:]] if self.config.validation else []


def found(folder: Path) -> str | None:
    last = last_checkpoint(folder / "checkpoints", 1)
    return None if last is None else last[0]


def alone(trial: Trial, folder: Path) -> dict[str, Tensor]:
    model = attach_lora(tiny(), rank=RANK, alpha=ALPHA)
    parameters = adapter_parameters(model)
    for key, value in trial.state().items():
        parameters[key].data.copy_(value)
    TrainingLoop(
        model,
        trial.optimizer(parameters),
        EagerPasses(model, list(parameters.values()), CPU),
        validation=[collate(each, packed=trial.config.packing, filler=0) for each in trial.validation()],
        filler=0,
        **trial.parts(folder),
    ).run(found(folder))
    return adapter_state(model)


def together(
    trials: list[Trial], folder: Path, make: Any = EagerPasses, device: torch.device = CPU
) -> list[dict[str, Tensor]]:
    model = ManyAdapters(
        tiny().to(device), [each.state() for each in trials], [ALPHA / RANK] * len(trials), dropout=0.0, device=device
    )
    passes = make(model, model.stacks(), device, arms=len(trials))
    model.share_gradients()
    arms = [
        Arm(
            model.named_parameters_of(number),
            each.optimizer(model.parameters_of(number)),
            validates=bool(each.validation()),
            **{**each.parts(folder / each.name), "worker": Worker(0, 1, device)},
        )
        for number, each in enumerate(trials)
    ]
    ArmsLoop(
        model,
        arms,
        passes,
        validation=[each.validation() for each in trials],
        packed=trials[0].config.packing,
        filler=0,
        worker=Worker(0, 1, device),
    ).run([found(folder / each.name) for each in trials])
    return [model.state_of(number) for number in range(len(trials))]


THREE = [
    Trial("a", seed=1, share=0.4),
    Trial("b", seed=2, share=1.0, init="default", settings={"learning_rate": 3e-3, "schedule": "linear"}),
    Trial("c", seed=3, share=0.6, rows=11, settings={"learning_rate": 2e-2, "max_grad_norm": 0.5, "epochs": 4}),
]


def require_alike(
    trial: Trial, folder: Path, mine: dict[str, Tensor], other: Path, theirs: dict[str, Tensor], name: str = "sft"
) -> None:
    ours, reference = metrics(folder, name), metrics(other, name)
    assert [line["step"] for line in ours] == [line["step"] for line in reference] != []
    for line, expected in zip(ours, reference, strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5), (trial.name, line["step"])
        assert line.get("learning_rate") == expected.get("learning_rate")
    start, masks = trial.state(), trial.masks()
    for key, value in mine.items():
        torch.testing.assert_close(value, theirs[key], rtol=1e-3, atol=1e-4)
        assert torch.equal(value[~masks[key]], start[key][~masks[key]]), key


@pytest.mark.parametrize("packing", [False, True])
def test_arms_together_end_like_each_arm_alone(packing: bool, tmp_path: Path) -> None:
    trials = [replace(each, settings={**(each.settings or {}), "packing": packing}) for each in THREE]
    adapters = together(trials, tmp_path / "together")
    assert len({len(metrics(tmp_path / "together" / each.name, "sft")) for each in trials}) > 1
    for trial, mine in zip(trials, adapters, strict=True):
        theirs = alone(trial, tmp_path / trial.name)
        require_alike(trial, tmp_path / "together" / trial.name, mine, tmp_path / trial.name, theirs)


def test_each_arm_validates_keeps_its_best_and_stops_by_itself(tmp_path: Path) -> None:
    settings = {"validation": 0.2, "schedule": "constant", "warmup_ratio": 0.0, "epochs": 8, "patience": 1}
    own = [{"validate_every": 2, "learning_rate": 0.05}, {"validate_every": 3}, {"validate_every": 1, "patience": None}]
    trials = [replace(each, settings=settings | other) for each, other in zip(THREE, own, strict=True)]
    adapters = together(trials, tmp_path / "together")
    ends = []
    for trial, mine in zip(trials, adapters, strict=True):
        folder = tmp_path / "together" / trial.name
        theirs = alone(trial, tmp_path / trial.name)
        require_alike(trial, folder, mine, tmp_path / trial.name, theirs, "sft_validation")
        ends.append(len(metrics(folder, "sft")))
    assert min(ends) < max(ends)


@pytest.mark.parametrize("at", [1, 5])
def test_interrupted_arms_resume_each_from_its_own_checkpoint(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = [
        replace(each, settings={**(each.settings or {}), "checkpoint_every": every})
        for each, every in zip(THREE, (2, 3, 4), strict=True)
    ]
    expected = together(trials, tmp_path / "whole")
    usual, taken = ArmsLoop._step, 0

    def cut_off(loop: ArmsLoop, running: list[int]) -> None:
        nonlocal taken
        if taken == at:
            raise Killed
        taken += 1
        usual(loop, running)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(ArmsLoop, "_step", cut_off)
        together(trials, tmp_path / "cut")
    adapters = together(trials, tmp_path / "cut")
    for trial, mine, theirs in zip(trials, adapters, expected, strict=True):
        require_alike(trial, tmp_path / "cut" / trial.name, mine, tmp_path / "whole" / trial.name, theirs)


def test_a_checkpoint_of_several_arms_is_one_of_an_arm_alone(tmp_path: Path) -> None:
    for trial, mine in zip(THREE, together(THREE, tmp_path), strict=True):
        theirs = alone(trial, tmp_path / trial.name)  # from its last step: nothing is left to do
        assert all(torch.equal(value, theirs[key]) for key, value in mine.items())


def test_an_arm_that_diverges_leaves_the_others_as_they_are(tmp_path: Path) -> None:
    trials = [replace(THREE[0], settings={"learning_rate": 1e30}), THREE[1]]
    _, other = together(trials, tmp_path / "together")
    lines = metrics(tmp_path / "together" / "a", "sft")
    assert [line["updates_skipped"] for line in lines] == [0, 0, 1, 1, 1, 1]  # after the last one, three are known
    assert "loss" in lines[0] and "loss" not in lines[-1]
    theirs = alone(THREE[1], tmp_path / "b")
    require_alike(THREE[1], tmp_path / "together" / "b", other, tmp_path / "b", theirs)


@pytest.mark.parametrize(
    ("dtype", "checkpointing"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)]
)
def test_losses_and_gradients_are_each_arms_own(dtype: torch.dtype, checkpointing: bool) -> None:
    trials = [Trial(str(seed), seed, 1.0) for seed in (1, 2, 3)]
    model = ManyAdapters(tiny().to(dtype), [each.state() for each in trials], [2.0] * 3, dropout=0.0, device=CPU)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    own = [[[each] for each in examples(6)[:2]], [[each] for each in examples(6)[2:4]], [[examples(6)[4]], []]]
    rows = collate([row for each in own for row in each], packed=False, filler=0, buckets=4, arms=3)
    again = rows_in(torch.cat([tensor.flatten() for tensor in rows.tensors()]), rows.shape)
    assert all(torch.equal(a, b) for a, b in zip(again.tensors(), rows.tensors(), strict=True))
    losses = arm_losses(model, again)
    losses.sum().backward()  # with checkpointing, layers are recomputed here
    gradients = [stack.grad for stack in model.stacks()]
    for number, trial in enumerate(trials):
        peft = attach_lora(tiny().to(dtype), rank=RANK, alpha=ALPHA)
        parameters = adapter_parameters(peft)
        for key, value in trial.state().items():
            parameters[key].data.copy_(value)
        loss = token_losses(peft, collate(own[number], packed=False, filler=0)).sum()
        tolerance = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
        torch.testing.assert_close(losses[number].detach(), loss.detach(), **tolerance)
        names = {id(stack): place for place, stack in enumerate(model.stacks())}
        theirs = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
        assert len(names) == len(theirs)
        for key in model.parameters_of(number):
            layer = model._layers[key.partition(".lora_")[0]]
            stack = layer.lora_A if ".lora_A." in key else layer.lora_B
            gradient = gradients[names[id(stack)]]
            assert gradient is not None
            mine = gradient[number]
            scale = float(theirs[key].abs().max())
            torch.testing.assert_close(
                mine, theirs[key], rtol=1e-3, atol=(1e-4 if dtype == torch.float32 else 0.1) * scale
            )


def test_an_arm_whose_gradient_is_not_finite_skips_its_step_and_the_others_take_theirs(tmp_path: Path) -> None:
    adapters = together(THREE, tmp_path / "together", spoilt(2, 3, arm=1))
    for number, trial in enumerate(THREE):
        lines = metrics(tmp_path / "together" / trial.name, "sft")
        assert [line["step"] for line in lines if line["updates_skipped"]] == ([2, 3] if number == 1 else [])
        assert all(value.isfinite().all() for value in adapters[number].values())
        if number != 1:
            expected = alone(trial, tmp_path / "alone" / trial.name)
            for key, value in adapters[number].items():
                torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("packing", [False, True])
def test_graphs_of_arms_give_the_losses_of_launching_one_by_one(packing: bool, tmp_path: Path) -> None:
    trials = [replace(each, settings={**(each.settings or {}), "packing": packing}) for each in THREE]
    device = torch.device("cuda")
    together(trials, tmp_path / "graphs", GraphPasses, device)
    together(trials, tmp_path / "eager", EagerPasses, device)
    for trial in trials:
        ours, theirs = (metrics(tmp_path / kind / trial.name, "sft") for kind in ("graphs", "eager"))
        assert len(ours) == len(theirs) > 0
        for mine, other in zip(ours, theirs, strict=True):
            assert mine["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_a_layer_that_sees_some_of_the_tokens_is_refused() -> None:
    from torch import nn

    model = ManyAdapters(tiny(), [THREE[0].state()] * 2, [1.0, 1.0], dropout=0.0, device=CPU)
    layer = next(iter(model._layers.values()))
    layer.batch.arms, layer.batch.tokens = 2, 12
    assert isinstance(layer.base_layer, nn.Linear)
    with pytest.raises(ValueError, match="sees only some of the tokens"):
        layer(torch.zeros(5, layer.base_layer.in_features))
