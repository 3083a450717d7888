"""Where settings come from: YAML files, command lines, and the modules of the user that a setting names."""

from __future__ import annotations

import dataclasses
import importlib
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
from pipeline.errors import UserError

set_parsing_settings(docstring_parse_attribute_docstrings=True)
CONFIG = "YAML file that lists differences from the defaults, or the name of one of the package's, like quickstart"
MAX_YAML_BYTES = 2**20
SHIPPED = Path(__file__).parents[1] / "configs"


def make_parser(description: str, documented: tuple[str, ...] = ("",)) -> ArgumentParser:
    """Makes a parser that takes every key; programs add arguments of theirs to it. `--help` lists the keys that begin
    with one of `documented`."""
    usage = "%(prog)s [--config FILE] [--KEY VALUE ...]"
    epilog = None if documented == ("",) else "The other keys of a run are taken too: see train.py --help."
    parser = ArgumentParser(description=description, usage=usage, epilog=epilog)
    parser.add_argument("--config", action=ActionConfigFile, help=CONFIG)
    parser.add_class_arguments(Config, instantiate=True)
    sections = [item.name for item in dataclasses.fields(Config)]
    for action in arguments_of(parser):
        section, _, key = action.dest.partition(".")
        if section in sections and not (key and action.dest.startswith(documented)):
            action.help = SUPPRESS
    return parser


def parse(parser: ArgumentParser, arguments: Sequence[str] | None = None) -> tuple[Config, Namespace]:
    """Returns the configuration that the arguments (by default the process's) give, and the parsed namespace with the
    program's other arguments. Raises UserError naming the key, the value and the fix."""
    ordered = _files_first(sys.argv[1:] if arguments is None else arguments)
    parser.exit_on_error = False  # it would print its usage above the error
    try:
        namespace = parser.instantiate(parser.parse_args(ordered))
    except ArgumentError as error:
        files = "".join(f" and {value}" for name, value in pairwise(ordered) if name == "--config")
        raise UserError(f"{' '.join(str(error).split())}; look at --help{files}") from None
    return Config(**{item.name: namespace[item.name] for item in dataclasses.fields(Config)}), namespace


def configure(file: str | Path | None = None, settings: Mapping[str, object] = MappingProxyType({})) -> Config:
    """Returns the configuration of a YAML file (a path, or the name of one of the package's) or else the defaults, with
    `settings` in place of some of its values: `configure("quickstart", {"run.name": "first", "training.steps": 500})`.
    Raises UserError naming the key, the value and the fix."""
    files = [] if file is None else ["--config", str(file)]
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in settings.items()}
    return parse(make_parser("configure"), [*files, *(f"--{key}={text}" for key, text in texts.items())])[0]


def _files_first(arguments: Sequence[str]) -> list[str]:
    """Moves `--config FILE` before all other arguments, because jsonargparse lets a file replace what stands before it;
    and checks each file."""
    files, others, remaining = [], list[str](), iter(arguments)
    for argument in remaining:
        name, _, value = argument.partition("=")
        if name == "--config" and (value := value or next(remaining, "")):
            path = _find_file(value)
            _check_sections(path, read_yaml(path), Config())
            files += ["--config", str(path)]
        else:
            others.append(argument)
    return files + others


def _find_file(name: str) -> Path:
    """Returns the file of this path; if there is none, the package's: `quickstart` or `configs/quickstart.yaml`."""
    path = Path(name)
    is_name = path.name == name and not path.suffix
    shipped = SHIPPED / (f"{name}.yaml" if is_name else path.name)
    if not path.exists() and (is_name or path.parent.name == "configs") and shipped.is_file():
        return shipped
    if path.exists() or not is_name:
        return path
    known = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.yaml")))
    raise UserError(f"--config is {name}: no such file, and none of the package's: {known}")


def _check_sections(path: Path, content: dict[str, Any], section: Any, prefix: str = "") -> None:
    """Raises UserError if a file gives a single value, or nothing, where a section of settings belongs."""
    for name, inner in vars(section).items():
        if dataclasses.is_dataclass(inner) and name in content:
            if not isinstance(content[name], dict):
                key = prefix + name
                raise UserError(f"{path}: {key} is {content[name]!r}: write its keys below it, or leave it out")
            _check_sections(path, content[name], inner, f"{prefix}{name}.")


class _StrictLoader(yaml.SafeLoader):
    """A YAML loader that refuses a key given twice, of which YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads the settings in a YAML file. Raises UserError if it can't be read, holds no mapping, or is too large."""
    try:
        content = path.read_bytes()
        if len(content) > MAX_YAML_BYTES:
            raise ValueError(f"its {len(content):,} bytes are no settings")
        settings = yaml.load(content.decode(), _StrictLoader)
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror})") from None
    except yaml.MarkedYAMLError as error:
        place = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{place}: {error.problem}; write SECTION: and below it KEY: VALUE") from None
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path}: is no YAML file of settings ({str(error).splitlines()[0]})") from None
    if not isinstance(settings, dict):
        what = type(settings).__name__
        raise UserError(f"{path}: holds no settings, but {what}; write SECTION: and below it KEY: VALUE")
    return settings


def to_yaml(config: Config) -> str:
    """Returns all settings as the text of a YAML file."""
    plain = json.loads(json.dumps(dataclasses.asdict(config)))  # YAML's safe subset has no tuples
    return yaml.safe_dump(plain, sort_keys=False)


def import_object(key: str, name: str) -> Any:
    """Imports the object that the setting `key` names as `module:NAME`, from the installed modules or the working
    directory. Raises UserError if there is none."""
    module, _, attribute = name.partition(":")
    if (folder := str(Path.cwd())) not in sys.path:
        sys.path.append(folder)
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{key} is {name!r}: {error}") from None
