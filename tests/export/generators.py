"""Generators with random weights, whose images a flip would change, and runs that hold one."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.config import NetworkConfig
from pipeline.distributed.collectives import Ranks
from pipeline.models.networks import Critic, Generator, initialise
from pipeline.rng import seeded
from pipeline.storage.checkpoint import CheckpointWriter
from pipeline.storage.run_folder import RunFolder


def random_generator(num_classes: int = 0, shape: tuple[int, int, int] = (1, 28, 28)) -> Generator:
    """A generator with random weights, biases and moving statistics, in eval mode."""
    generator = Generator(NetworkConfig(latent_dim=6, width=0.1), shape, num_classes)
    initialise(generator, seeded(num_classes, "weights"))
    random = seeded(num_classes, "norms")
    for name, tensor in generator.state_dict().items():
        if name.startswith("norms") and name.endswith(("weight", "running_var")):
            tensor.uniform_(0.5, 2, generator=random)
        elif name.endswith(("bias", "running_mean")):
            tensor.uniform_(-0.3, 0.3, generator=random)
    return generator.eval().requires_grad_(False)


def saved_run(
    run: RunFolder, generator: Generator, dataset_fingerprint: str, *steps: int, critic: Critic | None = None
) -> RunFolder:
    """A run on this dataset, all of whose checkpoints hold one generator and maybe one critic."""
    run.path.mkdir(parents=True, exist_ok=True)
    run.config.touch()
    state = {f"{role}.{name}": value for role in ("ema", "generator") for name, value in generator.state_dict().items()}
    state |= {f"critic.{name}": value for name, value in critic.state_dict().items()} if critic else {}
    writer = CheckpointWriter(run, Ranks(), keep_last=9, keep_every=None)
    for step in steps:
        writer.save(state, step, {"generator": generator.spec()})
    writer.finish()
    run.environment.write_text(json.dumps({"dataset_fingerprint": dataset_fingerprint}))
    return run


def damage(checkpoint: Path) -> None:
    """Cuts the last byte off a shard."""
    path = next(checkpoint.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])
