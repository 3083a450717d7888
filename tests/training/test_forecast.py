"""What a run says of its own duration after its first steps, and of its steps where it has them already."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipeline import train
from pipeline.distributed.process import Runtime
from pipeline.storage.run_folder import RunFolder
from pipeline.training import log
from tests.jobs import changed, restoring_process, tiny_config


def test_a_run_says_how_long_it_will_take(
    tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(data={"dataset": str(tiny_dataset)}, run={"root": str(tmp_path), "name": "short"})
    config = changed(config, training={"steps": 15, "batch_size": 8, "n_critic": 1})
    expected = r"3 steps at \S+ s: about 0 s; Ctrl-C saves, the same command goes on"
    with restoring_process():
        train(config)
        assert not re.search(expected, capsys.readouterr().err), "a minute needs no forecast"
        monkeypatch.setattr(log, "LONG_SECONDS", 0)
        train(changed(config, run={"name": "long"}))
        assert len(re.findall(expected, capsys.readouterr().err)) == 1
        evaluated = log.Forecast(changed(config, evaluation={"every": 15}), Runtime(config.runtime), 0)
        for step in (2, 12):
            evaluated.add_step(step)
        assert re.search(expected.replace("0 s;", "0 s, and evaluations;"), capsys.readouterr().err)


def test_a_finished_run_says_that_it_has_its_steps_and_stays_as_it_is(
    tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(data={"dataset": str(tiny_dataset)}, run={"root": str(tmp_path), "name": "short"})
    config = changed(config, training={"steps": 4, "batch_size": 8, "n_critic": 1})
    folder = RunFolder(config.folder)
    with restoring_process():
        train(config)
        paths = folder.config, folder.environment, folder.metrics
        files = [path.read_bytes() for path in paths]
        for steps in (4, 2):
            capsys.readouterr()
            assert train(changed(config, training={"steps": steps})).status == "finished, 4 steps"
            output = capsys.readouterr().err
            assert f"{folder.path} has its 4 steps already: for more, raise --training.steps" in output
            assert "going on" not in output
            assert [path.read_bytes() for path in paths] == files
        assert train(changed(config, training={"steps": 5})).status == "finished, 5 steps"
        assert "going on from" in capsys.readouterr().err
