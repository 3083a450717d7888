"""Writes the cores that this rank may run on, and its threads: `cores.py FOLDER`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from pipeline.config import RuntimeConfig
from pipeline.runtime import Runtime


def main(folder: str) -> None:
    runtime = Runtime(RuntimeConfig(device="cpu"))
    found = {"cores": sorted(os.sched_getaffinity(0)), "threads": torch.get_num_threads()}
    Path(folder, f"{runtime.rank}.json").write_text(json.dumps(found))
    runtime.close()


if __name__ == "__main__":
    main(sys.argv[1])
