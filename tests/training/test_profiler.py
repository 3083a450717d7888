"""The trace of some steps, as torch's profiler writes it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from pipeline.distributed.process import Runtime
from pipeline.storage.run_folder import RunFolder
from pipeline.training.trainer import Trainer
from tests.jobs import changed, restoring_process, tiny_config


@pytest.mark.slow
def test_the_steps_asked_for_are_traced_and_no_others(
    tiny_dataset: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    training = {"steps": 6, "batch_size": 8, "n_critic": 2}
    config = tiny_config(data={"dataset": str(tiny_dataset)}, training=training, run={"root": str(tmp_path)})
    config = changed(config, run={"profile": "2:4", "log_every": 6})
    with restoring_process():
        runtime = Runtime(config.runtime)
        Trainer(config, runtime).run()
        Trainer(changed(config, training={"steps": 7}), runtime).run()
        runtime.close()
    (path,) = (tmp_path / "wgan/profile").iterdir()
    assert path == RunFolder(config.folder).profile(2, 4, 0)
    output = capfd.readouterr().err
    assert "gpuGetDeviceCount" not in output, "a GPU that is not there is no error"
    assert f"profile: {path} opens in" in output
    assert "run.profile is 2:4, but the run goes on from step 6: no trace" in output
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    spans = sorted((event for event in events if event.get("cat") == "user_annotation"), key=lambda event: event["ts"])
    steps = [span for span in spans if span["name"].startswith("step ")]
    assert [step["name"] for step in steps] == ["step 2", "step 3", "step 4"]
    updates = [event["ts"] for event in events if str(event["name"]).startswith("Optimizer.step")]
    for step in steps:  # two updates of the critic, one of the generator
        assert sum(step["ts"] <= moment < step["ts"] + step["dur"] for moment in updates) == 3
