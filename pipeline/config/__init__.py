"""Every setting of a run, where settings come from, and the user's objects that they name."""

from pipeline.config.command_line import Parser as Parser
from pipeline.config.command_line import configure as configure
from pipeline.config.command_line import import_object as import_object
from pipeline.config.command_line import make_parser as make_parser
from pipeline.config.command_line import parse as parse
from pipeline.config.command_line import read_yaml as read_yaml
from pipeline.config.command_line import to_yaml as to_yaml
from pipeline.config.settings import Config as Config
from pipeline.config.settings import DataConfig as DataConfig
from pipeline.config.settings import EvaluationConfig as EvaluationConfig
from pipeline.config.settings import NetworkConfig as NetworkConfig
from pipeline.config.settings import OptimizerConfig as OptimizerConfig
from pipeline.config.settings import RunConfig as RunConfig
from pipeline.config.settings import RuntimeConfig as RuntimeConfig
from pipeline.config.settings import TrainingConfig as TrainingConfig
from pipeline.config.settings import flatten as flatten
