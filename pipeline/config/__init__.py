"""Every setting of a run, where settings come from, and the user's objects that they name."""

from pipeline.config.command_line import configure, make_parser, parse, to_yaml
from pipeline.config.settings import (
    Config,
    DataConfig,
    EvaluationConfig,
    NetworkConfig,
    OptimizerConfig,
    RunConfig,
    RuntimeConfig,
    TrainingConfig,
    captures_steps,
    check_device,
    flatten,
)
from pipeline.config.user_code import imported

__all__ = [
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "NetworkConfig",
    "OptimizerConfig",
    "RunConfig",
    "RuntimeConfig",
    "TrainingConfig",
    "captures_steps",
    "check_device",
    "configure",
    "flatten",
    "imported",
    "make_parser",
    "parse",
    "to_yaml",
]
