"""Objects of the user's that settings name."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from pipeline.errors import UserError


def imported(key: str, name: str) -> Any:
    """An object of the user's that a setting names: `module:NAME`, the module being installed or in the working
    directory. Raises UserError."""
    module, _, attribute = name.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{key} is {name!r}: {error}") from None
