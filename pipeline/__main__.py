"""The programs by name: `gan-pipeline COMMAND ...` of an installation, `python -m pipeline COMMAND ...` anywhere.

On several ranks it is `accelerate launch -m pipeline COMMAND ...`.
"""

from __future__ import annotations

import argparse
import runpy
import sys

PROGRAMS = {
    "train": "train a run, or go on with it",
    "evaluate": "score a run, a generator or images",
    "generate": "draw images from a trained generator",
    "prepare": "prepare a dataset",
    "report": "report on a run, or compare several",
    "doctor": "check a run before it starts",
}


def main() -> None:
    description = "\n".join(["commands:", *(f"  {name:<10}{what}" for name, what in PROGRAMS.items())])
    parser = argparse.ArgumentParser(
        "gan-pipeline", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=PROGRAMS, metavar="COMMAND", help="its own arguments follow: --help tells")
    command = parser.parse_args(sys.argv[1:2]).command
    sys.argv = [f"gan-pipeline {command}", *sys.argv[2:]]
    runpy.run_module(f"pipeline.{command}", run_name="__main__")


if __name__ == "__main__":
    main()
