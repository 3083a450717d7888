"""Where settings come from: YAML files, command lines, and the modules of the user that a setting names."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import json
import re
import sys
from argparse import SUPPRESS
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from pipeline.compat import arguments_of
from pipeline.config.settings import Config, flatten, leaves
from pipeline.errors import UserError

set_parsing_settings(docstring_parse_attribute_docstrings=True)
CONFIG = "YAML file that lists differences from the defaults, or the name of one of the package's, like quickstart"
MAX_YAML_BYTES = 2**20
SHIPPED = Path(__file__).parents[1] / "configs"
TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "list": "a list",
    "tuple": "a list of two numbers",
    "dict": "a mapping",
    "None": "null",
}
"""What a type of Python is called in a message."""


def make_parser(description: str, documented: tuple[str, ...] = ("",)) -> ArgumentParser:
    """Makes a parser that takes every key; programs add arguments of theirs to it. `--help` lists the keys that begin
    with one of `documented`."""
    usage = "%(prog)s [--config FILE] [--KEY VALUE ...]"
    epilog = None if documented == ("",) else "The other keys of a run are taken too: see train.py --help."
    parser = ArgumentParser(description=description, usage=usage, epilog=epilog, allow_abbrev=False)
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
    ordered = _files_first(parser, sys.argv[1:] if arguments is None else arguments)
    parser.exit_on_error = False  # it would print its usage above the error
    try:
        namespace = parser.instantiate(parser.parse_args(ordered))
    except ArgumentError as error:
        files = "".join(f" and {value}" for name, value in pairwise(ordered) if name == "--config")
        raise UserError(f"{_shorten(str(error))}; look at --help{files}") from None
    return Config(**{item.name: namespace[item.name] for item in dataclasses.fields(Config)}), namespace


def configure(file: str | Path | None = None, settings: Mapping[str, object] = MappingProxyType({})) -> Config:
    """Returns the configuration of a YAML file (a path, or the name of one of the package's) or else the defaults, with
    `settings` in place of some of its values: `configure("quickstart", {"run.name": "first", "training.steps": 500})`.
    Raises UserError naming the key, the value and the fix."""
    files = [] if file is None else ["--config", str(file)]
    texts = {
        key: str(value) if isinstance(value, str | Path) else json.dumps(value, default=str)
        for key, value in settings.items()
    }
    return parse(make_parser("configure"), [*files, *(f"--{key}={text}" for key, text in texts.items())])[0]


def _files_first(parser: ArgumentParser, arguments: Sequence[str]) -> list[str]:
    """Moves `--config FILE` before all other arguments, because jsonargparse lets a file replace what stands before it;
    and checks each file and the names of all arguments."""
    keys = [option[2:] for action in arguments_of(parser) for option in action.option_strings if option[:2] == "--"]
    mappings = tuple(f"{key}." for key, value in flatten(Config()).items() if isinstance(value, dict))
    files, others, remaining = [], list[str](), iter(arguments)
    for argument in remaining:
        name, _, value = argument.partition("=")
        key = name.removeprefix("--").removesuffix("+")  # KEY+ appends to a list
        if name == "--config" and (value := value or next(remaining, "")):
            path = _find_file(value)
            _check_keys(path, read_yaml(path), Config(), keys)
            files += ["--config", str(path)]
        elif name[:2] == "--" and key and key not in keys and not key.startswith(mappings):
            raise UserError(_unknown(key, keys))
        else:
            others.append(argument)
    return files + others


def _unknown(key: str, keys: Iterable[str]) -> str:
    """Returns the message that there is no such key, with the one that was perhaps meant."""
    ends_so = [known for known in keys if known.endswith(f".{key}")]
    similar = ends_so or difflib.get_close_matches(key, keys)
    return f"{key} is no setting: " + (f"did you mean {similar[0]}?" if similar else "--help lists them")


def _shorten(message: str) -> str:
    """Returns jsonargparse's message in one line, and that of a wrong type without the types that it has tried."""
    line = " ".join(message.split())
    if (wrong := re.search(r'key "([\w.]+)": .*(?:Got|Given) value: (.*)', line)) is None:
        return line
    key, value = wrong.groups()
    return f"{key} is {'null' if value == 'None' else value}: it must be {describe_type(key) or 'of another type'}"


def describe_type(key: str) -> str | None:
    """Returns in words what a setting takes; None if there is no such setting."""
    annotation = next((str(item.type) for name, _, item in leaves(Config()) if name == key), None)
    if annotation is None:
        return None
    if choices := re.search(r"Literal\[(.*?)\]", annotation):
        several, values = annotation.startswith("list"), choices[1].replace("'", "")
        return f"{'a list of' if several else 'one of'} {values}{' or null' if annotation.endswith('None') else ''}"
    return " or ".join(TYPES[kind.partition("[")[0]] for kind in annotation.split(" | "))


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


def _check_keys(path: Path, content: dict[Any, Any], section: Any, keys: Sequence[str], prefix: str = "") -> None:
    """Raises UserError if a file has an unknown key, or gives a single value, or nothing, where a section belongs."""
    for name in content:
        if (key := f"{prefix}{name}") not in keys:
            raise UserError(f"{path}: {_unknown(key, keys)}")
    for name, inner in vars(section).items():
        if dataclasses.is_dataclass(inner) and name in content:
            if not isinstance(content[name], dict):
                key = prefix + name
                raise UserError(f"{path}: {key} is {content[name]!r}: write its keys below it, or leave it out")
            _check_keys(path, content[name], inner, keys, f"{prefix}{name}.")


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
