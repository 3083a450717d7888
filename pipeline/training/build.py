"""The step as the settings and the ranks ask for it: plain, in micro-batches, captured as a graph."""

from __future__ import annotations

from functools import partial

from pipeline.config import Config
from pipeline.distributed.batch_norm import convert_batch_norm, make_fakes_together
from pipeline.distributed.process import Runtime
from pipeline.models.objectives import Objective
from pipeline.training.cuda_graph import CapturedStep
from pipeline.training.inputs import StepFunction
from pipeline.training.micro_batches import MicroBatchStep
from pipeline.training.state import TrainingState
from pipeline.training.step import Step, make_fakes


def build_step(config: Config, objective: Objective, state: TrainingState, runtime: Runtime) -> StepFunction:
    """A function of one step's inputs that updates `state`."""
    training, ranks, count = config.training, runtime.ranks, config.runtime.accumulation
    fakes = make_fakes
    if ranks.world_size > 1 and count == 1:
        convert_batch_norm(state.generator)
        fakes = partial(make_fakes_together, autocast=runtime.autocast)
    critic, generator = (runtime.wrap(each, data_parallel=count == 1) for each in (state.critic, state.generator))
    step = Step(training, objective, state, critic, generator, fakes)
    if count > 1:
        whole = training, objective, state, critic, generator
        step = MicroBatchStep(*whole, count=count, ranks=ranks, autocast=runtime.autocast)
    return CapturedStep(step, state, runtime) if config.runtime.cuda_graph else step
