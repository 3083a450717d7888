"""The step as the settings and the ranks ask for it: whole or in micro-batches, captured as a graph or not."""

from __future__ import annotations

from functools import partial

from pipeline.config import Config
from pipeline.distributed.batch_norm import LayerwiseStepGenerator, convert_batch_norm
from pipeline.distributed.process import Runtime
from pipeline.models.networks import Generator, StepGenerator
from pipeline.models.objectives import Objective
from pipeline.training.accumulation import AccumulatingGenerator, average_gradients
from pipeline.training.cuda_graph import CapturedStep
from pipeline.training.inputs import StepFunction
from pipeline.training.state import TrainingState
from pipeline.training.step import Step


def build_step(config: Config, objective: Objective, state: TrainingState, runtime: Runtime) -> StepFunction:
    """Returns a function of one step's inputs that updates `state`."""
    training, ranks, micro_batches = config.training, runtime.ranks, config.runtime.accumulation
    by_batch, ours = training.critic_fakes == "batch", isinstance(state.generator, Generator)
    if micro_batches > 1:
        assert isinstance(state.generator, Generator), "checks/settings.py refuses a user's: its layers are not known"
        critic = runtime.wrap(state.critic, data_parallel=False)
        images = AccumulatingGenerator(state.generator, micro_batches, by_batch, ranks, runtime.autocast)
        step = Step(training, objective, state, critic, images, micro_batches, partial(average_gradients, ranks=ranks))
    else:
        if ranks.world_size > 1:
            convert_batch_norm(state.generator)
            convert_batch_norm(state.critic)  # the reference's has none, one of the user's may
        layer_by_layer = ours and by_batch and (ranks.world_size > 1 or runtime.device.type == "cuda")
        generator = (LayerwiseStepGenerator if layer_by_layer else StepGenerator)(state.generator, by_batch)
        step = Step(training, objective, state, runtime.wrap(state.critic), runtime.wrap(generator))
    return CapturedStep(step, state, runtime) if runtime.captures else step
