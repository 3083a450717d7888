"""The programs by name: `gan-pipeline COMMAND ...` of an installation, `python -m pipeline COMMAND ...` anywhere.

On several ranks it is `accelerate launch -m pipeline COMMAND ...`.
"""

from __future__ import annotations

import difflib
import os
import runpy
import sys
from argparse import ArgumentParser

from pipeline import __version__

PROGRAMS = {
    "train": ("pipeline.train", "train a run, or go on with it"),
    "evaluate": ("pipeline.evaluate", "score a run, a generator or images"),
    "generate": ("pipeline.generate", "draw images from a trained generator"),
    "prepare": ("pipeline.prepare", "prepare a dataset"),
    "report": ("pipeline.report", "report on a run, or compare several"),
    "doctor": ("pipeline.doctor", "check a run before it starts"),
    "export": ("pipeline.export", "convert a trained generator: safetensors, ONNX, Keras, a folder for the Hub"),
    "checkpoint": ("pipeline.checkpoint", "list, verify or consolidate a run's checkpoints"),
    "tune": ("pipeline.tune", "search settings for the best score"),
    "benchmark": ("pipeline.benchmark", "measure this machine"),
    "train-classifier": ("pipeline.evaluation.train_classifier", "train a classifier for a dataset's own features"),
}
"""Command -> module that is run, and what it does."""


def main() -> None:
    command, *arguments = sys.argv[1:] or ["--help"]
    if "_ARGCOMPLETE" in os.environ:
        from argcomplete import autocomplete  # it prints how the line goes on, and ends the process

        words = os.environ["COMP_LINE"][: int(os.environ["COMP_POINT"])].split(" ")
        if len(words) < 3:
            (parser := ArgumentParser()).add_argument("command", choices=PROGRAMS)
            autocomplete(parser)
        command, os.environ["_ARGCOMPLETE"] = words[1], "2"  # two words name the program, whose parser does the same
    if command in ("-h", "--help"):
        lines = [f"  {name:<18}{purpose}" for name, (_, purpose) in PROGRAMS.items()]
        usage = "usage: gan-pipeline COMMAND [ARGUMENTS], gan-pipeline COMMAND --help, gan-pipeline --version"
        print("\n".join([usage, "", "commands:", *lines]))
    elif command == "--version":
        print(f"gan-pipeline {__version__}")
    elif command in PROGRAMS:
        sys.argv = [f"gan-pipeline {command}", *arguments]
        runpy.run_module(PROGRAMS[command][0], run_name="__main__")
    else:
        similar = difflib.get_close_matches(command, PROGRAMS, 1)
        fix = f"did you mean {similar[0]}?" if similar else f"choose one of {', '.join(PROGRAMS)}"
        print(f"error: {command} is no command: {fix}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
