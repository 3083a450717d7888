"""YAML files of settings, read without what YAML allows and settings have no use for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import UserError

YAML_BYTES = 2**20
"""Size of the largest file of settings."""


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key given twice, of which YAML would have the last count alone."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings in a YAML file.

    Raises:
        UserError: it can't be read, is no mapping, or is more than a file of settings ever is.
    """
    try:
        content = path.read_bytes()
        if len(content) > YAML_BYTES:
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
        raise UserError(
            f"{path}: holds no settings, but {type(settings).__name__}; write SECTION: and below it KEY: VALUE"
        )
    return settings
