"""What the command line says to people: pages of help and errors of one line. It is imported when that is needed."""

from __future__ import annotations

import re
import sys
from argparse import SUPPRESS, ArgumentParser
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

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
ELSEWHERE = {
    **{"lr": "learning_rate", "bs": "batch_size", "batch": "batch_size", "z_dim": "latent_dim", "nz": "latent_dim"},
    **dict.fromkeys(("epochs", "iterations", "iters"), "steps"),
}
"""What other programs call a setting, and its name here."""


class PlainParser(ArgumentParser):
    """argparse's parser, whose errors are one line as well."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Raises UserError."""
        raise UserError(f"{message.replace('PositiveInt value', 'whole number above 0')}; {HELP}")


def page(parser: Parser, write: Callable[[], str]) -> str:
    """Returns the help that `write` makes, without most settings unless the command line asks for all, without what
    jsonargparse adds everywhere, and with types in plain words."""
    hidden = SETTINGS - set(parser.first) if parser.first and "--help-all" not in sys.argv else set()
    for argument in arguments_of(parser):
        if argument.dest in hidden or str(argument.help).startswith(UNUSED):
            argument.help = SUPPRESS
    text = write()
    for noise in (r"<class\s+'|(?<=\w)'>", r"type:\s+Literal\[[^]]*\](,\s+)?", r"(,\s+)?default:\s+(null)?(?=\))"):
        text = re.sub(noise, "", text)
    return text.replace(" ()", "")


def unknown(key: str, keys: Sequence[str]) -> str:
    """Returns the message that there is no such key, with those that were perhaps meant: a similar name of the same
    section (or, without a section, an argument of the program), or else the most similar name of any."""
    section, _, name = key.rpartition(".")
    parts = [known.rpartition(".")[::2] for known in keys]
    wanted, names = ELSEWHERE.get(name, name), {last for _, last in parts}
    similar = [wanted] if wanted in names else get_close_matches(wanted, names, n=9, cutoff=0.75)
    meant = [f"{section}.{last}".strip(".") for last in similar if (section, last) in parts][:1]
    beside = [last for before, last in parts if before == section]
    if not section and not meant:  # an argument of the program's, such as --step, comes before training.steps
        meant = get_close_matches(name, beside, 1, 0.85)
    if "." in section and beside and not meant:
        return f"{key} is no setting: {section} has {', '.join(beside)}"
    meant = meant or [known for known, (_, last) in zip(keys, parts, strict=True) if last in similar[:1]]
    meant = [known if "." in known or hasattr(Config, known) else f"--{known}" for known in meant]
    return f"{key} is no setting: " + (f"did you mean {' or '.join(meant)}?" if meant else "--help-all lists them")


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
        choices = re.search(r"Literal\[(.*?)\]", tried)
        types = TYPES | ({"typing": f"one of {choices[1].replace(chr(39), '')}"} if choices else {})
        kinds = [types.get(kind, kind) for kind in re.findall(r"(?:Expected a|of type) (?:<class ')?(\w+)\b", tried)]
        value = re.sub(r" does not .*|invalid .*: ", "", value)
        kind = " or ".join(kinds)
        if re.fullmatch(r"[a-z_][\w:.,-]*", value):
            kind = kind.replace("[A, B]", f"'[{value}]'")
        return f"{key} is {'null' if value == 'None' else value or 'empty'}: it must be {kind}; {HELP}"
    if (stray := line.removeprefix("unrecognized arguments: ")) != line:
        name = stray.split()[0].lstrip("-")
        meant = f"--{name}" if name.partition("=")[0] in keys else ""
        meant = meant or (f"--config {name}" if (SHIPPED / f"{name}.yaml").exists() else "")
        if not meant and stray[:2] == "--":
            meant = "".join(f"--{known}" for known in get_close_matches(name.partition("=")[0], keys, 1))
        elif not meant and "generator" in keys:
            meant = f"-g {name}"
        return f"{stray} is not understood" + (f": did you mean {meant}?" if meant else f"; {HELP}")
    if "are required" in line:
        line = re.sub(r"\w+\.(?=\w)", "", line)  # of a program with commands jsonargparse says COMMAND.NAME
        for name, option in (("generator", "-g GENERATOR"), ("dataset", "--dataset")):  # it says an option's name alone
            line = line.replace(f": {name}", f": {option}")
    return f"{line}; {HELP}"
