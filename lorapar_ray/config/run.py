"""The whole config tree, and the checks across its sections."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, model_validator

from lorapar_ray.config.base import Section, Seed, Word, unusable
from lorapar_ray.config.cluster import ClusterConfig
from lorapar_ray.config.data import DataConfig
from lorapar_ray.config.evaluate import EvaluateConfig
from lorapar_ray.config.grpo import JUDGE, GrpoConfig
from lorapar_ray.config.label import LabelConfig, TeacherConfig
from lorapar_ray.config.marks import Operation, Result
from lorapar_ray.config.model import AdapterConfig, ModelConfig
from lorapar_ray.config.score import PartitionConfig, ScoreConfig
from lorapar_ray.config.sft import SftConfig
from lorapar_ray.redact import redacted


class Config(Section):
    """A whole run."""

    name: Operation[Word]
    """The run's name; its directory is `runs/<name>` unless `--run-dir` is given."""
    seed: Result[Seed] = 0
    """Seed of all random numbers in a run."""
    order: Result[Annotated[list[Literal["sft", "grpo"]], Field(min_length=1)]] = ["sft", "grpo"]
    """The training stages; each starts from the previous stage's adapter; `[sft]` and `[grpo, sft]` are baselines."""
    model: Result[ModelConfig]
    """The student: the model to tune."""
    data: Result[DataConfig]
    """The questions to train and to evaluate on."""
    label: Result[LabelConfig] = LabelConfig(strategy="random")
    """How each training question gets its System: teachers and their prompt."""
    adapter: Result[AdapterConfig] = AdapterConfig()
    """The LoRA adapter, or another method to compare with."""
    score: Result[ScoreConfig] = ScoreConfig()
    """How the importance of the adapter's elements is measured."""
    partition: Result[PartitionConfig] = PartitionConfig()
    """The cut: θ, α, β, and baselines."""
    sft: Result[SftConfig] = SftConfig()
    """Stage 1."""
    grpo: Result[GrpoConfig] = GrpoConfig()
    """Stage 2."""
    evaluate: Result[EvaluateConfig] = EvaluateConfig()
    """What is evaluated, and how."""
    cluster: Operation[ClusterConfig] = ClusterConfig()
    """How much of the cluster the run may use."""

    @model_validator(mode="before")
    @classmethod
    def _values_are_usable(cls, tree: Any) -> Any:
        if found := unusable(tree):
            raise ValueError(f"{'.'.join(found[0])}: {found[1]}")
        return tree

    @model_validator(mode="after")
    def _systems_are_defined(self) -> Config:
        known = sorted(self.label.definitions)
        for name, systems in (("sft", self.sft.systems), ("grpo", self.grpo.systems)):
            if unknown := set(systems) - set(known):
                raise ValueError(
                    f"{name}.systems: System {min(unknown)} is not in label.definitions ({known[0]} to {known[-1]})"
                )
        return self

    @model_validator(mode="after")
    def _sources_fit_labels(self) -> Config:
        known, given = set(self.label.definitions), {each.system for each in self.data.train}
        for part, sources in (("train", self.data.train), ("test", self.data.test)):
            for index, each in enumerate(sources):
                if each.system is not None and each.system not in known:
                    raise ValueError(
                        f"data.{part}[{index}].system: System {each.system} is not in label.definitions "
                        f"(1 to {max(known)})"
                    )
        if self.label.strategy != "source":
            if given != {None}:
                raise ValueError(
                    f"data.train: label.strategy {self.label.strategy} does not use the entries' system; set "
                    "label.strategy to source, or remove it"
                )
        elif None in given:
            index = [each.system for each in self.data.train].index(None)
            raise ValueError(f"data.train[{index}].system: missing, and label.strategy source takes the label from it")
        elif without := known - given:
            raise ValueError(
                f"data.train: no entry has system {min(without)}, which label.definitions defines; add one, or remove "
                "the definition"
            )
        return self

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Config:
        if len(set(self.order)) != len(self.order):
            raise ValueError("order: each stage at most once; for two SFT epochs set sft.epochs to 2")
        if self.model.quantization is not None and self.adapter.init in ("pissa", "pissa_fast", "olora"):
            raise ValueError(
                f"adapter.init: {self.adapter.init} subtracts from the base's weights, which a 4-bit base cannot "
                "represent; remove model.quantization or set adapter.init to default or gaussian"
            )
        if self.partition.regions != "stages" and self.order != ["sft"]:
            raise ValueError(
                f"partition.regions: {self.partition.regions} regions are trained by SFT alone; set order to [sft], or "
                "regions to stages"
            )
        if self.sft.sequence:
            if self.order != ["sft"] or self.adapter.method != "lora":
                raise ValueError("sft.sequence: trains a LoRA by SFT alone; set order to [sft]")
            if self.sft.masked and self.partition.regions == "stages":
                raise ValueError(
                    "sft.sequence: each System needs a region of its own; set partition.regions to own or disjoint, or "
                    "sft.masked to false"
                )
        if unknown := [name for name in self.evaluated if "-" in name and name not in self.trained]:
            raise ValueError(
                f"evaluate.models: {unknown[0]} is no adapter of this run, whose training leaves "
                f"{', '.join(self.trained)}"
            )
        known = {teacher.name for teacher in self.label.teachers}
        if self.grpo.judged and (not known or not set(self.grpo.judge.teachers) <= known):
            raise ValueError(
                f"grpo.judge: the reward {JUDGE} asks teachers of label.teachers by name; there "
                + (f"are {', '.join(sorted(known))}" if known else "are none")
            )
        if self.adapter.method != "lora":
            if self.order != ["sft"] or self.sft.masked:
                raise ValueError(
                    f"adapter.method: {self.adapter.method} has nothing to partition and vLLM cannot sample from it; "
                    "set order to [sft] and sft.masked to false"
                )
            if self.evaluate.tasks:
                raise ValueError(
                    f"evaluate.tasks: needs vLLM, which does not serve {self.adapter.method}; leave it empty"
                )
            if self.sft.packing or self.sft.gradient_checkpointing or self.sft.sharding != "none":
                raise ValueError(
                    f"adapter.method: {self.adapter.method} trains without sft.packing, sft.gradient_checkpointing "
                    "and sft.sharding; turn them off"
                )
        return self

    @property
    def partitioned(self) -> bool:
        """Whether any stage trains only a region; if not, `score` and `partition` are not needed."""
        return any({"sft": self.sft.masked, "grpo": self.grpo.masked}[stage] for stage in self.order)

    @property
    def scored(self) -> list[int]:
        """The Systems whose importance is scored: the paper's two, or all if each has a region of its own."""
        return [1, 2] if self.partition.regions == "stages" else sorted(self.label.definitions)

    @property
    def warms_up(self) -> bool:
        """Whether the adapter is trained for a few steps before scoring: with B = 0 every score would be zero."""
        return self.partitioned and self.adapter.init == "default" and self.adapter.warmup_steps > 0

    @property
    def judges(self) -> list[TeacherConfig]:
        """The teachers that grade completions in stage 2, each with an engine of its own."""
        chosen = self.grpo.judge.teachers
        judges = [each for each in self.label.teachers if self.grpo.judged and (not chosen or each.name in chosen)]
        return [each.model_copy(update={"engine_of": None}) for each in judges]

    @property
    def trained(self) -> list[str]:
        """The adapters that training leaves, in order: of each stage, and within a sequence after each System."""
        between = [f"sft-{system}" for part in self.sft.parts[:-1] for system in part]
        return [name for stage in self.order for name in ([*between, stage] if stage == "sft" else [stage])]

    @property
    def evaluated(self) -> list[str]:
        """The models to evaluate."""
        return ["base", *self.trained] if self.evaluate.models is None else list(self.evaluate.models)

    def to_yaml(self, *, hide_secrets: bool = False) -> str:
        """The resolved config with all defaults.

        Args:
            hide_secrets: for output that is shown or stored (see `lorapar_ray.redact.redacted`).
        """
        tree = self.model_dump(mode="json")
        return _as_yaml(redacted(tree) if hide_secrets else tree)


def _as_yaml(tree: dict[str, Any]) -> str:
    """libyaml is four times as fast, but writes an emoji as an escape."""
    fast = yaml.__with_libyaml__ and json.dumps(tree, ensure_ascii=False).isascii()
    dumper = yaml.CSafeDumper if fast else yaml.SafeDumper
    return str(yaml.dump(tree, Dumper=dumper, sort_keys=False, allow_unicode=True))
