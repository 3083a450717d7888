"""One rank that is a whole process group, as torch's launcher starts it: arguments FOLDER ARGUMENTS FAIL, as JSON.

DDP, batch norm over the ranks and the capture of their collectives, as on several GPUs, over NCCL with one member.
"""

from __future__ import annotations

import copy
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch.distributed as dist

from pipeline.distributed.collectives import Ranks
from pipeline.distributed.process import Runtime
from pipeline.training.step import build_step
from pipeline.training.trainer import Trainer
from tests.gpu.walks import Bench, take_steps, walk, without_graphs

ON_PURPOSE = "this failure is part of the test"
STEPS = 4


def main(folder: str, arguments: list[str], fail: bool) -> None:
    place = Path(folder, "one-rank")
    place.mkdir(exist_ok=True)
    # At nine critic updates a step DDP would look at a captured event, were that not switched off.
    settings = {"runtime.precision": "float64", "runtime.cuda_graph": True, "training.n_critic": 9}
    config = Bench(place, arguments).config("wgan", settings)
    # One process has no group of its own: the launcher's environment is left to accelerate, which makes one.
    with patch("pipeline.distributed.launcher.environment_without_accelerate", lambda **_: nullcontext()):
        runtime = Runtime(config.runtime)
    try:
        reference, trainer = (Trainer(config, each) for each in (without_graphs(runtime), runtime))
        several = copy.copy(runtime)
        several.ranks = Ranks(0, 2)  # the step is built as for two ranks; the group that it talks to has one
        trainer.step = build_step(config, trainer.objective, trainer.state, several)
        if fail:
            take_steps(trainer, 2)
            raise RuntimeError(ON_PURPOSE)
        difference = walk(trainer, STEPS).difference(walk(reference, STEPS))
        groups: list[Any] = [None, dist.new_group(backend="gloo")]
        objects = [dist.get_backend(group) for group in groups if _returns(group)]
    finally:
        runtime.close()
    print(json.dumps({"difference": difference, "objects": objects}), flush=True)


def _returns(group: Any) -> bool:
    """Returns whether a Python object comes back from a gather and from a broadcast."""
    sent = {"step": 3, "names": ["one", "other"]}
    gathered: list[object] = [None]
    broadcast = [sent]
    dist.all_gather_object(gathered, sent, group=group)
    dist.broadcast_object_list(broadcast, group=group)
    return gathered == broadcast == [sent]


if __name__ == "__main__":
    main(sys.argv[1], *map(json.loads, sys.argv[2:]))
