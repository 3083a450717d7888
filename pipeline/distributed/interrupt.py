"""^C before there is anything to save. Imports next to nothing: it is what a program imports first."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType


def end_quietly_while_importing() -> None:
    """What a program imports before `run_program` takes a second or two: ^C ends it then without a traceback. A user's
    own program that imports the pipeline keeps its ways."""
    package = Path(__file__).parents[1]
    as_module = sys.argv[0] == "-m" and any(argument.startswith("pipeline.") for argument in sys.orig_argv)
    if as_module or Path(sys.argv[0]).absolute().parent == package:
        on_interrupt(signal.SIG_DFL)


def on_interrupt(handler: signal.Handlers | Callable[[int, FrameType | None], object]) -> None:
    """Whoever had it ignored, like nohup, is obeyed."""
    if signal.getsignal(signal.SIGINT) in (signal.default_int_handler, signal.SIG_DFL):
        signal.signal(signal.SIGINT, handler)
