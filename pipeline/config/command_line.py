"""Where settings come from: YAML files, command lines, and the modules of the user that a setting names."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from argparse import HelpFormatter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace, set_parsing_settings

from pipeline.compat import arguments_of
from pipeline.config.settings import Config, flatten
from pipeline.errors import UserError

set_parsing_settings(docstring_parse_attribute_docstrings=True)
CONFIG = "YAML file of settings, or a name such as quickstart"
MAX_YAML_BYTES = 2**20
SHIPPED = Path(__file__).parents[1] / "configs"
FIRST = (
    *("run.name", "data.dataset", "training.objective", "training.steps", "training.seed", "training.batch_size"),
    *("training.n_critic", "training.critic_optimizer.learning_rate", "evaluation.every", "evaluation.features"),
)
"""The settings that people change first."""


class Parser(ArgumentParser):
    """A parser whose help and errors are those of `messages`."""

    first: tuple[str, ...] = ()
    """The settings that `--help` shows, of those that `make_parser` adds; the rest is in `--help-all`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises UserError."""
        from pipeline.config.messages import shorten

        raise UserError(shorten(message, _keys(self)))

    def format_help(self, formatter: HelpFormatter | None = None) -> str:
        from pipeline.config.messages import page

        return page(self, lambda: super(Parser, self).format_help(formatter))


def make_parser(description: str, first: tuple[str, ...] = FIRST) -> Parser:
    """Makes a parser that takes every setting and shows those of `first`; programs add arguments of theirs to it."""
    parser = Parser(
        description=description,
        usage="%(prog)s [--config FILE] [--KEY VALUE ...]",
        epilog="--help-all lists all settings.",
    )
    parser.first = first
    parser.add_argument("--help-all", action="help", help="show every setting and exit")
    parser.add_argument("--config", action=ActionConfigFile, help=CONFIG)
    arguments_of(parser)[-1].help = "Print the settings as YAML and exit."
    parser.add_class_arguments(Config, instantiate=True)
    return parser


def parse(parser: Parser, arguments: Sequence[str] | None = None) -> tuple[Config, Namespace]:
    """Returns the configuration that the arguments (by default the process's) give, and the parsed namespace with the
    program's other arguments. Raises UserError naming the key, the value and the fix."""
    ordered = _files_first(parser, sys.argv[1:] if arguments is None else arguments)
    try:
        namespace = parser.instantiate(parser.parse_args(ordered))
        return Config(**{item.name: namespace[item.name] for item in dataclasses.fields(Config)}), namespace
    except UserError as error:
        for name, file in pairwise(ordered):
            if name == "--config" and _holds(read_yaml(Path(file)), str(error)):
                raise UserError(f"{file}: {error}") from None
        raise


def configure(file: str | Path | None = None, settings: Mapping[str, object] = MappingProxyType({})) -> Config:
    """Returns the configuration of a YAML file (a path, or the name of one of the package's) or else the defaults, with
    `settings` in place of some of its values: `configure("quickstart", {"run.name": "first", "training.steps": 500})`.
    Raises UserError naming the key, the value and the fix."""
    if not isinstance(file, str | Path | None):
        raise UserError(f'{file!r} is no file: give its path or name first, as in ("quickstart", {{...}})')
    arguments = [] if file is None else ["--config", str(file)]
    for key, value in settings.items():
        arguments.append(f"--{key}={value if isinstance(value, str | Path) else json.dumps(value, default=str)}")
    try:
        return parse(make_parser("configure"), arguments)[0]
    except UserError as error:
        raise UserError(str(error).partition("; look at --help")[0]) from None  # which Python has not


def _holds(content: Any, message: str) -> bool:
    """Returns whether a file's content has the value of which a message says `KEY is VALUE:`."""
    key, *_ = message.partition(" is ")
    for name in key.split("."):
        content = content.get(name) if isinstance(content, dict) else None
    return message.startswith(f"{key} is {content}:")


def _keys(parser: Parser) -> list[str]:
    return [option[2:] for argument in arguments_of(parser) for option in argument.option_strings if option[:2] == "--"]


def _files_first(parser: Parser, arguments: Sequence[str]) -> list[str]:
    """Moves `--config FILE` before all other arguments, because jsonargparse lets a file replace what stands before it;
    and checks each file and the names of all arguments."""
    keys = _keys(parser)
    mappings = tuple(f"{key}." for key, value in flatten(Config()).items() if isinstance(value, dict))
    files, others, remaining = [], list[str](), iter(arguments)
    for argument in remaining:
        name, _, value = argument.partition("=")
        key = name.removeprefix("--").removesuffix("+")  # KEY+ appends to a list
        if name == "--config" and (value := value or next(remaining, "")):
            path = _find_file(value)
            content = read_yaml(path)
            if {"score", "space"} <= content.keys():
                raise UserError(f"{path}: is a study of settings: give it to gan-pipeline tune, before --config")
            _check_keys(path, content, keys)
            files += ["--config", str(path)]
        elif name[:2] == "--" and key and key not in keys and not key.startswith(mappings):
            _refuse(key, keys)
        else:
            others.append(argument)
    return files + others


def _refuse(key: str, keys: Sequence[str], where: str = "") -> NoReturn:
    from pipeline.config.messages import unknown

    raise UserError(f"{where}{unknown(key, keys)}")


def _find_file(name: str) -> Path:
    """Returns the file of this path; if there is none, the package's: `quickstart` or `configs/quickstart.yaml`."""
    path, known = Path(name), {file.stem: file for file in sorted(SHIPPED.glob("*.yaml"))}
    if path.exists() and not path.is_dir():
        return path
    if (stem := name.removeprefix("configs/").removesuffix(".yaml")) not in known:
        from difflib import get_close_matches

        similar = get_close_matches(path.stem, known, 1)
        fix = f": did you mean {similar[0]}?" if similar else f", and none of the package's: {', '.join(known)}"
        raise UserError(f"--config is {name}: no such file{fix}")
    return known[stem]


def _check_keys(path: Path, content: dict[Any, Any], keys: Sequence[str], prefix: str = "") -> None:
    """Raises UserError if a file has an unknown key, or gives a single value, or nothing, where a section belongs."""
    for name, value in content.items():
        if (key := f"{prefix}{name}") not in keys:
            _refuse(key, keys, f"{path}: ")
        if any(known.startswith(f"{key}.") for known in keys):
            if not isinstance(value, dict):
                raise UserError(f"{path}: {key} is {value!r}: write its keys below it, or leave it out")
            _check_keys(path, value, keys, f"{key}.")


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
        if not isinstance(settings := yaml.load(content.decode(), _StrictLoader), dict):
            raise ValueError(f"it holds {type(settings).__name__}; write SECTION: and below it KEY: VALUE")
        return settings
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror})") from None
    except yaml.MarkedYAMLError as error:
        place = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{place}: {error.problem}; write SECTION: and below it KEY: VALUE") from None
    except (ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path}: is no YAML file of settings ({str(error).splitlines()[0]})") from None


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
        hint = ""
        if getattr(error, "name", None) == module:
            hint = "; leave out .py" if module.endswith(".py") else f"; it was looked for in {folder}"
        raise UserError(f"{key} is {name!r}: {error}{hint}") from None
