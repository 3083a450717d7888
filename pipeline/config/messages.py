"""What the command line says to people: pages of help and errors of one line. It is imported when that is needed."""

from __future__ import annotations

import difflib
import re
import sys
from argparse import SUPPRESS, ArgumentParser
from collections.abc import Callable, Sequence
from typing import NoReturn

from pipeline.compat import arguments_of
from pipeline.config.command_line import SHIPPED, Parser
from pipeline.config.settings import Config, flatten
from pipeline.errors import UserError

SETTINGS = flatten(Config()).keys()
HELP = "look at --help"
TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "list": "a list, like [A, B]",
    "tuple": "a list of two numbers",
    "dict": "a mapping, like {KEY: VALUE}",
    "NoneType": "null",
    "PositiveInt": "a whole number above 0",
}
"""What jsonargparse expects, and what it is called in a message."""
UNUSED = ("Path to a configuration file", "Print the configuration after")
"""How the help of arguments begins that jsonargparse adds everywhere and nobody needs."""
FIRST = (
    *("run.name", "data.dataset", "training.objective", "training.steps", "training.seed", "training.batch_size"),
    *("training.n_critic", "evaluation.every", "evaluation.features", "runtime.device"),
)
"""The settings that people change first."""


class PlainParser(ArgumentParser):
    """argparse's parser, whose errors are one line as well."""

    def error(self, message: str) -> NoReturn:
        """Raises UserError."""
        raise UserError(f"{message.replace('PositiveInt value', 'whole number above 0')}; {HELP}")


def page(parser: Parser, write: Callable[[], str]) -> str:
    """Returns the help that `write` makes, without most settings unless the command line asks for all, without what
    jsonargparse adds everywhere, and with types in plain words."""
    arguments = arguments_of(parser)
    texts = [argument.help for argument in arguments]
    hidden = set[str]()
    if "help_all" in {argument.dest for argument in arguments} and "--help-all" not in sys.argv:
        hidden = SETTINGS - set(parser.first or FIRST)
    for argument in arguments:
        if argument.dest in hidden or str(argument.help).startswith(UNUSED):
            argument.help = SUPPRESS
    text = write()
    for argument, known in zip(arguments, texts, strict=True):
        argument.help = known
    for noise in (r"<class\s+'|(?<=\w)'>", r"type:\s+Literal\[[^]]*\](,\s+)?", r"(,\s+)?default:\s+(null)?(?=\))"):
        text = re.sub(noise, "", text)
    return text.replace(" ()", "")


def unknown(key: str, keys: Sequence[str]) -> str:
    """Returns the message that there is no such key, with the one that was perhaps meant: an argument of the program,
    a setting of this name in some section, or a similar one."""
    similar = difflib.get_close_matches(key, [known for known in keys if ("." in known) == ("." in key)])
    similar = similar or [known for known in keys if known.endswith(f".{key}")] or difflib.get_close_matches(key, keys)
    return f"{key} is no setting: " + (f"did you mean {similar[0]}?" if similar else "--help-all lists them")


def shorten(message: str, keys: Sequence[str]) -> str:
    """Returns jsonargparse's message in one line that names the key, the value and what belongs there."""
    line = " ".join(message.split()).rstrip(".")
    if line.endswith("but it was not provided"):
        return f"no command is given; {HELP}"
    if section := re.search(r"key \"([\w.]+)\": Unable to load config '(.*)' - ", line):
        key, value = section.groups()
        names = [known.removeprefix(f"{key}.") for known in keys if known.rpartition(".")[0] == key]
        return f"{key} is {value}, but it is a section: give --{key}.{names[0]} or others: {', '.join(names[1:])}"
    if wrong := re.search(r'key "([\w.]+)": (.*(?:Got|Given) value:|Not of type PositiveInt:) ?(.*)', line):
        key, tried, value = wrong.groups()
        key = key if key in SETTINGS else f"--{key.rpartition('.')[2]}"
        kinds = [TYPES.get(kind, kind) for kind in re.findall(r"(?:Expected a|of type) (?:<class ')?(\w+)\b", tried)]
        choices = re.search(r"Literal\[(.*?)\]", tried)
        kinds = [
            f"one of {choices[1].replace(chr(39), '')}" if choices and kind == "typing" else kind for kind in kinds
        ]
        value = re.sub(r" does not .*|invalid .*: ", "", value)
        return f"{key} is {'null' if value == 'None' else value or 'empty'}: it must be {' or '.join(kinds)}; {HELP}"
    if (stray := line.removeprefix("unrecognized arguments: ")) != line:
        name = stray.split()[0]
        known = name.lstrip("-").partition("=")[0] in keys
        meant = f"--{name.lstrip('-')}" if known else f"--config {name}" if (SHIPPED / f"{name}.yaml").exists() else ""
        return f"{stray} is not understood: did you mean {meant}?" if meant else f"{stray} is not understood; {HELP}"
    if "are required" in line:
        line = re.sub(r"\w+\.(?=\w)", "", line)  # of a program with commands jsonargparse says COMMAND.NAME
    return f"{line}; {HELP}"
