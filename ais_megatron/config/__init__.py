"""The configuration: a YAML file plus ``key=value`` overrides becomes one frozen `Config`. Nothing here imports torch."""

from ais_megatron.config.algorithm import AISConfig, CorrectionOptions, ObjectiveConfig
from ais_megatron.config.architecture import Architecture
from ais_megatron.config.diffusion import DiffusionConfig
from ais_megatron.config.errors import ConfigError, explain
from ais_megatron.config.evaluation import EvalConfig, EvalSet, EvaluationSet
from ais_megatron.config.experiment import Config
from ais_megatron.config.hf_config import read_architecture
from ais_megatron.config.reading import build_config, dump_config, load_config, read_yaml
from ais_megatron.config.rollout import RolloutConfig
from ais_megatron.config.settings import (
    CalibrationConfig,
    CheckpointConfig,
    MetricsConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    SFTConfig,
    TokenizerConfig,
    TrainConfig,
)
from ais_megatron.config.sglang import SGLangConfig
from ais_megatron.config.task import BUILTIN_TASKS, TaskConfig

__all__ = [
    "BUILTIN_TASKS",
    "AISConfig",
    "Architecture",
    "CalibrationConfig",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "CorrectionOptions",
    "DiffusionConfig",
    "EvalConfig",
    "EvalSet",
    "EvaluationSet",
    "MetricsConfig",
    "MoEConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RolloutConfig",
    "RunConfig",
    "SFTConfig",
    "SGLangConfig",
    "TaskConfig",
    "TokenizerConfig",
    "TrainConfig",
    "build_config",
    "dump_config",
    "explain",
    "load_config",
    "read_architecture",
    "read_yaml",
]
