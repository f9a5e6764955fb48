"""The configuration: dataclasses, their checks, and reading them from YAML."""

from megatron_rdt.config.checks import check_config
from megatron_rdt.config.engines import ENGINES, EngineKind
from megatron_rdt.config.load import dump_config, load_config, load_saved_config, read_saved_model
from megatron_rdt.config.model import ModelConfig
from megatron_rdt.config.schema import (
    CheckpointConfig,
    CorpusConfig,
    DataConfig,
    DepthConfig,
    EvalConfig,
    LoggingConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    RunSection,
    SampleConfig,
    ScheduleConfig,
    TrainConfig,
)

__all__ = [
    "ENGINES", "CheckpointConfig", "CorpusConfig", "DataConfig", "DepthConfig", "EngineKind", "EvalConfig",
    "LoggingConfig", "ModelConfig", "OptimizerConfig", "ParallelConfig", "RunConfig", "RunSection", "SampleConfig",
    "ScheduleConfig", "TrainConfig", "check_config", "dump_config", "load_config", "load_saved_config",
    "read_saved_model",
]  # fmt: skip
