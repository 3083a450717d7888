"""A trace of some steps for a browser: what each operation took on the CPU and on the GPU."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from tempfile import NamedTemporaryFile

from torch.profiler import ProfilerActivity, profile, record_function

from pipeline.config import RunConfig
from pipeline.distributed.process import Runtime
from pipeline.storage.files import replacing
from pipeline.storage.run_folder import RunFolder
from pipeline.training.state import TrainingState


def profiled(
    take_step: Callable[[], None], run: RunConfig, state: TrainingState, runtime: Runtime, folder: RunFolder
) -> Callable[[], None]:
    """`take_step`, which takes the state one step on; traced in the steps that `run.profile` names.

    Each of these is a span "step N". After the last of them every rank writes a file, Chrome's format compressed.
    A run that goes on from a step among or after them is not traced, so that the same command can be queued again.
    """
    if run.profiled_steps is None:
        return take_step
    first, last = run.profiled_steps
    if state.step >= first:
        runtime.print(f"run.profile is {run.profile}, but the run goes on from step {state.step}: no trace")
        return take_step
    on_gpu = [ProfilerActivity.CUDA] if runtime.device.type == "cuda" else []
    profiler = profile(activities=[ProfilerActivity.CPU, *on_gpu], record_shapes=True, acc_events=True)

    def traced() -> None:
        step = state.step + 1
        if not first <= step <= last:
            return take_step()
        if step == first:
            profiler.start()
        with record_function(f"step {step}"):
            take_step()
        if step == last:
            profiler.stop()
            with runtime.tolerating(f"steps {first} to {last}: profile"):
                path = folder.profile(first, last, runtime.ranks.rank)
                with replacing(path) as temporary, NamedTemporaryFile(suffix=".json.gz") as trace:
                    profiler.export_chrome_trace(trace.name)  # it compresses by the name
                    shutil.copyfile(trace.name, temporary)
                runtime.print(f"profile: {path} opens in ui.perfetto.dev or chrome://tracing")
        return None

    return traced
