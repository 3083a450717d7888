"""What a run says of its own duration after its first steps."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipeline import train
from pipeline.training import log
from tests.jobs import changed, restoring_process, tiny_config


def test_a_run_says_how_long_it_will_take(
    tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(data={"dataset": str(tiny_dataset)}, run={"root": str(tmp_path), "name": "short"})
    config = changed(config, training={"steps": 15, "batch_size": 8, "n_critic": 1})
    expected = r"3 steps at [\d.]+ s: about 0 s, and evaluations; Ctrl-C saves, the same command goes on"
    with restoring_process():
        train(config)
        assert not re.search(expected, capsys.readouterr().err), "a minute needs no forecast"
        monkeypatch.setattr(log, "LONG_SECONDS", 0)
        train(changed(config, run={"name": "long"}))
        assert len(re.findall(expected, capsys.readouterr().err)) == 1
