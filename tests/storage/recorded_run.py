"""A run and a record of what it does to its folder: `recorded_run.py LOG [--KEY VALUE ...]`. Beside LOG it leaves a
JSON file with the SHA-256 of each tensor of each step that it began to save."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch import Tensor

from pipeline.config import make_parser, parse
from pipeline.distributed.launcher import run_program
from pipeline.distributed.process import Runtime
from pipeline.storage.checkpoint import Checkpoint, CheckpointWriter, sha256_of_tensor
from pipeline.storage.files import write_text
from pipeline.storage.run_folder import RunFolder
from pipeline.training.trainer import Trainer
from tests.storage.power_cuts import promise, recorded

commit, save = CheckpointWriter._commit, CheckpointWriter.save
SAVED: dict[int, dict[str, str]] = {}


def commit_and_promise(writer: CheckpointWriter, temporary: Path, checkpoint: Checkpoint) -> None:
    commit(writer, temporary, checkpoint)
    promise(str(checkpoint.step))


def note_and_save(writer: CheckpointWriter, tensors: dict[str, Tensor], step: int, *rest: Any) -> None:
    SAVED[step] = {name: sha256_of_tensor(tensor.detach().contiguous()) for name, tensor in tensors.items()}
    save(writer, tensors, step, *rest)


def main() -> None:
    log, (config, _) = Path(sys.argv[1]), parse(make_parser("test"), sys.argv[2:])
    runtime, folder = Runtime(config.runtime), RunFolder(config.folder)
    ranks, trainer = runtime.ranks, Trainer(config, runtime)
    pids = ranks.gather(os.getpid())
    with contextlib.ExitStack() as stack:
        if ranks.is_main:
            stack.enter_context(recorded(log, pids))
        stack.enter_context(patch.object(CheckpointWriter, "_commit", commit_and_promise))
        stack.enter_context(patch.object(CheckpointWriter, "save", note_and_save))
        stack.enter_context(patch("pipeline.reporting.page.write_report"))  # replaced like the other files, slowly
        ranks.any(False)
        trainer.run()
        if ranks.is_main:
            write_text(folder.scores(config.training.steps), json.dumps({"step": config.training.steps}))
        ranks.any(False)
    if ranks.is_main:
        log.with_suffix(".json").write_text(json.dumps(SAVED))
    runtime.close()


if __name__ == "__main__":
    run_program(main)
