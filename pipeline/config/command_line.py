"""The command line and the files that give a run's settings, and the settings as a file."""

from __future__ import annotations

import dataclasses
import json
import sys
from argparse import SUPPRESS
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from pipeline.compat import arguments_of
from pipeline.config.settings import Config
from pipeline.config.yaml_files import read_yaml
from pipeline.errors import UserError

set_parsing_settings(docstring_parse_attribute_docstrings=True)
CONFIG = "YAML file that lists differences from the defaults, or the name of one of the package's, like quickstart"


def make_parser(description: str, concerned: tuple[str, ...] = ("",)) -> ArgumentParser:
    """A parser of every key; programs add their own arguments to it.

    Args:
        concerned: what the keys begin with that `--help` documents, the others being of no concern to the program.
    """
    usage = "%(prog)s [--config FILE] [--KEY VALUE ...]"
    others = None if concerned == ("",) else "The other keys of a run are taken too: see train.py --help."
    parser = ArgumentParser(description=description, usage=usage, epilog=others)
    parser.add_argument("--config", action=ActionConfigFile, help=CONFIG)
    parser.add_class_arguments(Config, instantiate=True)
    sections = [item.name for item in dataclasses.fields(Config)]
    for action in arguments_of(parser):
        section, _, key = action.dest.partition(".")
        if section in sections and not (key and action.dest.startswith(concerned)):
            action.help = SUPPRESS
    return parser


def configure(file: str | Path | None = None, settings: Mapping[str, object] = MappingProxyType({})) -> Config:
    """The configuration of a YAML file, or of one of the package's by its name, and over it `settings` by their dotted
    keys: `configure("quickstart", {"run.name": "first", "training.steps": 500})`. Without a file: the defaults.

    Raises:
        UserError: naming the key, the value and the fix.
    """
    files = [] if file is None else ["--config", str(file)]
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in settings.items()}
    return parse(make_parser("configure"), [*files, *(f"--{key}={text}" for key, text in texts.items())])[0]


def parse(parser: ArgumentParser, arguments: Sequence[str] | None = None) -> tuple[Config, Namespace]:
    """The configuration that the arguments give, and the parsed namespace with an entry's own arguments.

    Raises:
        UserError: naming the key, the value and the fix.
    """
    given = _files_first(sys.argv[1:] if arguments is None else arguments)
    parser.exit_on_error = False  # it would print its usage above the error
    try:
        namespace = parser.instantiate(parser.parse_args(given))
    except ArgumentError as mistake:
        files = "".join(f" and {value}" for name, value in pairwise(given) if name == "--config")
        raise UserError(f"{' '.join(str(mistake).split())}; look at --help{files}") from None
    return Config(**{item.name: namespace[item.name] for item in dataclasses.fields(Config)}), namespace


def _files_first(arguments: Sequence[str]) -> list[str]:
    """`--config FILE` before everything else: a file replaces all that was given before it. Each file is checked."""
    files, rest, following = [], list[str](), iter(arguments)
    for argument in following:
        name, _, value = argument.partition("=")
        if name == "--config" and (value := value or next(following, "")):
            file = _settings_file(value)
            _check_sections(file, read_yaml(file), Config())
            files += ["--config", str(file)]
        else:
            rest.append(argument)
    return files + rest


def _settings_file(name: str) -> Path:
    """The file of this path; where there is none, the one of the package: quickstart, or configs/quickstart.yaml."""
    path, shipped = Path(name), Path(__file__).parents[1] / "configs"
    if path.exists():
        return path
    if path.parent.name == "configs" and (shipped / path.name).is_file():
        return shipped / path.name
    if path.name != name or path.suffix:
        return path
    if (shipped / f"{name}.yaml").is_file():
        return shipped / f"{name}.yaml"
    known = ", ".join(sorted(file.stem for file in shipped.glob("*.yaml")))
    raise UserError(f"--config is {name}: no such file, and none of the package's: {known}")


def _check_sections(path: Path, given: dict[str, Any], config: Any, prefix: str = "") -> None:
    """Raises UserError for a section of settings that is a single value, or nothing."""
    for name, section in vars(config).items():
        if dataclasses.is_dataclass(section) and name in given:
            if not isinstance(given[name], dict):
                raise UserError(f"{path}: {prefix}{name} is {given[name]!r}: write its keys below it, or leave it out")
            _check_sections(path, given[name], section, f"{prefix}{name}.")


def to_yaml(config: Config) -> str:
    plain = json.loads(json.dumps(dataclasses.asdict(config)))  # YAML's safe subset has no tuples
    return yaml.safe_dump(plain, sort_keys=False)
