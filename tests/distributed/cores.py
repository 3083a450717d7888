"""Writes how this rank uses its machine's cores: `cores.py FOLDER`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from pipeline.config import RuntimeConfig
from pipeline.distributed.process import Runtime


def main(folder: str) -> None:
    runtime = Runtime(RuntimeConfig(device="cpu"))
    subnormals = int((torch.full((2**20,), 1e-38) / 10).count_nonzero())
    found = {"cores": sorted(os.sched_getaffinity(0)), "threads": torch.get_num_threads(), "subnormals": subnormals}
    Path(folder, f"{runtime.ranks.rank}.json").write_text(json.dumps(found))
    runtime.close()


if __name__ == "__main__":
    main(sys.argv[1])
