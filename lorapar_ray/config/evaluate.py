"""Stage `evaluate`, and `lorapar evaluate --model` without a run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lorapar_ray.config.base import Distinct, PositiveFloat, PositiveInt, StopStrings
from lorapar_ray.config.engine import EngineConfig, Resources, require_gpu_for_each_rank
from lorapar_ray.config.marks import Operation, Result
from lorapar_ray.config.ranges import NumberOrRange, Ranged
from lorapar_ray.config.sandbox import SandboxConfig

TaskName = Annotated[str, Field(pattern=r"^[^@]+(@[0-9]+)?$", max_length=300)]
"""`NAME` or `NAME@SHOTS`."""

Model = Literal["base", "sft", "grpo", "sft-1", "sft-2", "sft-3", "sft-4", "sft-5", "sft-6", "sft-7", "sft-8", "sft-9"]


class EvaluateConfig(Ranged):
    """Stage `evaluate`: accuracy of each named model on the test rows, greedily, and on lm-eval's tasks."""

    models: Result[Annotated[Distinct[Model], Field(min_length=1)] | None] = None
    """Models to evaluate; None: the base and every stage of `order`. `sft-2`: the adapter after System 2 of a sequence
    (`sft.sequence`); that after the last System is `sft`."""
    answer: Result[Literal["numeric", "exact", "option_letter"]] = "numeric"
    """How an answer is compared with the reference: by value, by text, or by the option letter."""
    max_new_tokens: Result[PositiveInt] = 256
    """Longest answer, in tokens."""
    stop: Result[StopStrings] = []
    """Strings at which an answer ends."""
    tasks: Result[Distinct[TaskName]] = []
    """Tasks and groups of lm-eval (extra `eval`) and task files: `gsm8k`, `mmlu@5` with five examples in the prompt,
    `my_task.yaml`."""
    limit: Result[PositiveInt | None] = None
    """Use the first so many questions of each task (of MMLU: of each subject). None: all."""
    data: Result[dict[str, str]] = {}
    """A file or folder instead of the hub's data: `gsm8k`, `mmlu`, `arc_easy`, `arc_challenge`, `boolq`, `svamp`,
    `mawps`, `humaneval`, `mbpp`."""
    include: Result[list[str]] = []
    """Folders of your own task files."""
    chat: Result[bool] = False
    """Ask tasks with the model's chat template and `model.system_prompt`; else as plain text, like lm-eval."""
    max_gen_toks: Result[PositiveInt | None] = None
    """Longest answer to a task, in tokens. None: the task's own limit."""
    samples: Result[PositiveInt] = 1
    """Answers sampled for each question of a generation task."""
    pass_at: Result[PositiveInt] = 1
    """k of pass@k, from `samples` answers (HumanEval, MBPP, word problems)."""
    temperature: Result[PositiveFloat | None] = None
    """Sampling temperature for several samples; a single answer is greedy."""
    sandbox: Operation[SandboxConfig] = SandboxConfig()
    """The sandbox in which the model's programs for HumanEval and MBPP run."""
    engine: Result[EngineConfig] = EngineConfig()
    """Settings of each engine; `max_model_len` holds a question and its answer."""
    engines: Operation[NumberOrRange] = 1
    """Engines that share the questions. A range, `[1, 4]`: as many as the cluster has room for. An engine joins when
    there is a node for it, and when its node is lost the others get its questions."""
    max_engines: Operation[PositiveInt | None] = None
    """The most engines, where `engines` is not a list: as resolved configs have it."""
    serve: Operation[Literal["auto", "merged", "adapter"]] = "auto"
    """`merged`: adapters are added to the base's weights; `adapter`: served as LoRA. `auto`: merged if possible."""
    resources: Operation[Resources] = Resources()
    """Resources of each engine."""

    @model_validator(mode="after")
    def _samples_suffice(self) -> EvaluateConfig:
        if self.pass_at > self.samples:
            raise ValueError(
                f"pass_at: pass@{self.pass_at} needs at least {self.pass_at} samples of each question; samples is "
                f"{self.samples}"
            )
        if self.samples > 1 and self.temperature is None:
            raise ValueError("samples: several greedy answers are all the same; set temperature")
        return self

    @model_validator(mode="after")
    def _gpu_for_each_rank(self) -> EvaluateConfig:
        require_gpu_for_each_rank("resources", self.resources, "engine", self.engine)
        return self
