"""TRL's SFTTrainer with our clipping, validation loss, metrics and checkpoints.

Left to TRL and transformers: the loss, DDP, the schedule, gradient accumulation and checkpointing, the trackers. Ours:
which elements train (the optimiser), clipping that sees those only, the data order (`batches`), a validation loss that
does not depend on how the rows were spread over workers, and files without pickle (`checkpoint`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback
from trl import SFTTrainer

from lorapar_ray.sft.checkpoint import SafetensorsCheckpoints
from lorapar_ray.sft.head import score_labels_only
from lorapar_ray.sft.tracking import append_line, memory_mib


class Stage1Trainer(SafetensorsCheckpoints, SFTTrainer):
    """Trainer of one worker. `optimizers=(MaskedAdamW, None)` is expected."""

    control: Any

    def __init__(
        self, *, metrics: Path, active_share: float, validation: Sequence[list[dict[str, Any]]] = (), **options: Any
    ) -> None:
        """Beyond SFTTrainer's own arguments:

        Args:
            metrics: file that gets a JSON line a step; `<stem>_validation.jsonl` beside it one per validation.
            active_share: active elements over all elements, for the metrics.
            validation: this worker's micro-batches of validation rows, as many as every other worker's.
        """
        self._lines = metrics
        self._share = active_share
        self._validation = validation
        self._clock = time.monotonic()
        self._tokens_before: float = 0
        # Over a sharded base transformers allows no checkpoint of the optimiser's state, since that would be sharded
        # too. Ours belongs to the adapter, which is whole on every worker.
        options["args"].save_only_model = getattr(options["model"], "is_distributed_loading_by_transformers", False)
        super().__init__(**options)
        self.args.save_only_model = False
        if self.args.device.type == "cpu":
            score_labels_only(self.model.get_base_model())

    def _clip_grad_norm(self, model: Any) -> Any:
        """The joint norm of the active elements, from before they are scaled down to `max_grad_norm`."""
        return self.optimizer.optimizer.clip_grad_norm_(self.args.max_grad_norm)

    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
        """Mean loss per response token over the whole validation split, each token counted once."""
        self.model.eval()
        totals = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        with torch.no_grad():
            for rows in self._validation:
                output = self.model(**self._prepare_inputs(self.data_collator(rows)), fused_lm_head=True)
                totals[0] -= output.log_probs.double().sum()
                totals[1] += output.label_mask.sum()
        if self.args.world_size > 1:
            dist.all_reduce(totals)
        loss = float(totals[0] / totals[1])
        metrics = {f"{metric_key_prefix}_loss": loss}
        self.log(metrics)
        self.model.train()
        if self.is_world_process_zero():
            file = self._lines.with_name(f"{self._lines.stem}_validation.jsonl")
            append_line(file, {"step": self.state.global_step, "loss": loss})
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._clock = time.monotonic()
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Send a step's figures to the trackers and to the metrics file."""
        if "loss" not in logs:
            super().log(logs, start_time)
            return
        now = time.monotonic()
        seconds, self._clock = now - self._clock, now
        tokens, self._tokens_before = self._total_train_tokens - self._tokens_before, self._total_train_tokens
        line = {
            "loss": float(logs["loss"]),
            "learning_rate": logs["learning_rate"],
            "grad_norm": float(logs["grad_norm"]),
            "tokens_per_s": tokens / seconds,
            "active_share": self._share,
            "memory_mib": memory_mib(),
            "seconds": seconds,
        }
        logs.update(line)
        super().log(logs, start_time)
        if self.is_world_process_zero():
            append_line(self._lines, {"step": self.state.global_step, **line})

    @contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        """Nothing to defer: the sharded base has no gradients."""
        yield

    def _sync_replicated_trainable_parameters(self, model: Any) -> None:
        """Over a sharded base the adapter is whole on every worker, outside DDP: average its gradients once a step."""
        world = self.args.world_size
        if world == 1:
            return

        def average(parameter: torch.Tensor) -> None:
            if self.accelerator.sync_gradients:
                dist.all_reduce(parameter.grad)
                parameter.grad.div_(world)  # type: ignore[union-attr]

        for parameter in self._trained().values():
            dist.broadcast(parameter.data, src=0)
            parameter.register_post_accumulate_grad_hook(average)


class ValidateAtTheEnd(TrainerCallback):
    """A validation after the last step too, so that it can be the best one."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_evaluate = True
