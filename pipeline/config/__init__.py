"""Every setting of a run, where settings come from, and the user's objects that they name."""

from pipeline.config.command_line import configure, import_object, make_parser, parse, read_yaml, to_yaml
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
    "import_object",
    "make_parser",
    "parse",
    "read_yaml",
    "to_yaml",
]
