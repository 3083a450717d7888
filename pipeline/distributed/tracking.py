"""accelerate's trackers, by their names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from pipeline.errors import UserError


def check_trackers(names: Sequence[str], options: Mapping[str, Any]) -> str:
    """Raises UserError for a tracker that accelerate does not know, for one whose package is missing, and for options
    of one that is not named."""
    available = {str(kind.value) for kind in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise UserError(f"run.trackers holds {name!r}: choose from {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}")
        if name not in available:
            raise UserError(f"run.trackers holds {name!r}, whose package is missing: pip install {name}")
    for name, given in options.items():
        if name not in names:
            raise UserError(
                f"run.tracker_options names {name}, which run.trackers {list(names)} does not: add it there"
            )
        if not isinstance(given, dict):
            raise UserError(f"run.tracker_options.{name} is {given!r}: write its arguments below it, e.g. entity: NAME")
    return ", ".join(names) or "none"


def open_tracker(name: str, project: str, folder: Path, arguments: Mapping[str, Any]) -> Any:
    """A started tracker.

    Args:
        folder: for those that write to a folder. TensorBoard's files are right in it: it names a series after the
            folders above its files, so one of the project's name would only double the run's.
        arguments: accelerate's `init_kwargs` of this tracker.
    """
    kind = LOGGER_TYPE_TO_CLASS[name]
    places = (
        ("", folder) if name == "tensorboard" else (project, folder) if kind.requires_logging_directory else (project,)
    )
    tracker = kind(*places, **arguments)
    tracker.start()
    return tracker
