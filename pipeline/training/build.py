"""The step as the settings and the ranks ask for it: plain, augmented, in micro-batches, captured as a graph."""

from __future__ import annotations

from pipeline.config import Config
from pipeline.distributed.batch_norm import LayerwiseStepGenerator, convert_batch_norm
from pipeline.distributed.process import Runtime
from pipeline.models.networks import Generator, StepGenerator
from pipeline.models.objectives import Objective
from pipeline.training.cuda_graph import CapturedStep
from pipeline.training.diff_augment import AugmentedMicroBatchStep, AugmentedStep
from pipeline.training.inputs import StepFunction
from pipeline.training.micro_batches import MicroBatchStep
from pipeline.training.state import TrainingState
from pipeline.training.step import Step


def build_step(config: Config, objective: Objective, state: TrainingState, runtime: Runtime) -> StepFunction:
    """A function of one step's inputs that updates `state`."""
    training, ranks, count = config.training, runtime.ranks, config.runtime.accumulation
    if ranks.world_size > 1 and count == 1:
        convert_batch_norm(state.generator)
        convert_batch_norm(state.critic)  # the reference's has none, one of the user's may
    by_batch = training.critic_fakes == "batch"
    together = by_batch and (ranks.world_size > 1 or runtime.device.type == "cuda")
    together = together and isinstance(state.generator, Generator)
    images = (LayerwiseStepGenerator if together else StepGenerator)(state.generator, by_batch)
    critic, generator = (runtime.wrap(each, data_parallel=count == 1) for each in (state.critic, images))
    given, augmented = (training, objective, state, critic, generator), bool(training.diff_augment)
    if count == 1:
        step = AugmentedStep(*given) if augmented else Step(*given)
    else:
        micro_batch_step = AugmentedMicroBatchStep if augmented else MicroBatchStep
        step = micro_batch_step(*given, count=count, ranks=ranks, autocast=runtime.autocast)
    return CapturedStep(step, state, runtime) if runtime.captures else step
