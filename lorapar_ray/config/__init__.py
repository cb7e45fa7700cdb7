"""The typed config tree: reads YAML, writes resolved YAML, refuses unknown fields.

Each field is marked `Result` (it changes a result) or `Operation` (it changes only how the result is computed; see
`marks`).
"""

from lorapar_ray.config.base import Dtype, Section, System
from lorapar_ray.config.cluster import ClusterConfig
from lorapar_ray.config.data import DataConfig, FileSource, HubSource, NamedSource, ReasoningGymSource, Source
from lorapar_ray.config.engine import EngineConfig, Resources
from lorapar_ray.config.evaluate import EvaluateConfig
from lorapar_ray.config.grpo import ENVIRONMENT, JUDGE, REWARDED_ELSEWHERE, GrpoConfig, JudgeConfig, RewardConfig
from lorapar_ray.config.label import LabelConfig, TeacherConfig, VoteExample, VotePrompt
from lorapar_ray.config.marks import Operation, Result, deciding, result_but_not
from lorapar_ray.config.model import AdapterConfig, ModelConfig
from lorapar_ray.config.run import Config
from lorapar_ray.config.sandbox import SandboxConfig
from lorapar_ray.config.score import PartitionConfig, ScoreConfig
from lorapar_ray.config.sft import SftConfig

__all__ = [
    "ENVIRONMENT",
    "JUDGE",
    "REWARDED_ELSEWHERE",
    "AdapterConfig",
    "ClusterConfig",
    "Config",
    "DataConfig",
    "Dtype",
    "EngineConfig",
    "EvaluateConfig",
    "FileSource",
    "GrpoConfig",
    "HubSource",
    "JudgeConfig",
    "LabelConfig",
    "ModelConfig",
    "NamedSource",
    "Operation",
    "PartitionConfig",
    "ReasoningGymSource",
    "Resources",
    "Result",
    "RewardConfig",
    "SandboxConfig",
    "ScoreConfig",
    "Section",
    "SftConfig",
    "Source",
    "System",
    "TeacherConfig",
    "VoteExample",
    "VotePrompt",
    "deciding",
    "result_but_not",
]
