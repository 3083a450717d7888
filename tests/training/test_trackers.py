"""What trackers hold of a run that was killed and went on, read back from their own files."""

from __future__ import annotations

import json
import math
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import IMAGES, EventAccumulator
from tensorboard.plugins.hparams import metadata

from pipeline.config import Config
from pipeline.data import Dataset
from pipeline.storage.run_folder import RunFolder
from tests.jobs import ROOT, changed, flags, launch, tiny_config
from tests.ranks import Job

TRAIN = ROOT / "pipeline/train.py"
STEPS = 14
BLOCK = 1 << 15
NAMES = {
    **{"loss/critic": "critic_loss", "loss/generator": "generator_loss"},
    **{"grad_norm/critic": "critic_grad_norm", "grad_norm/generator": "generator_grad_norm"},
    **{f"critic/{key}": key for key in ("wasserstein_estimate", "clipped_fraction")},
    **{f"speed/{key}_seconds": f"{key}_seconds" for key in ("data_wait", "elapsed", "evaluation")},
    "speed/images_per_second": "images_per_second",
}
"""The names in trackers of the numbers of the log."""
OFFLINE = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}


def tracked(digits: Dataset, root: Path, *trackers: str, steps: int = STEPS) -> Config:
    """Scores at 4, 8, 12 and the last step, grids at each second one, a checkpoint at each third."""
    return tiny_config(
        run={
            **{"name": "tracked", "root": str(root), "trackers": list(trackers)},
            **{"sample_every": 2, "checkpoint_every": 3},
        },
        data={"dataset": str(digits.folder)},
        training={"steps": steps, "n_critic": 1, "batch_size": 16},
        evaluation={"every": 4, "num_images": 200},
    )


def killed_at(path: Path, config: Config, log: Path) -> None:
    """Trains until there is such a file, and kills the process then."""
    with Job(TRAIN, flags(config), 1, stdout=log, stderr=log, variables=OFFLINE) as running:
        deadline = time.monotonic() + 120
        while not path.exists():
            assert running.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.005)
        running.ranks[0].kill()


def trained(config: Config) -> None:
    result = launch(TRAIN, flags(config), variables=OFFLINE)
    assert result.returncode == 0, result.stderr[-3000:]


def wandb_history(run: RunFolder) -> list[tuple[str, str, dict[str, Any]]]:
    """Id, name and last values by key of each launch, from the file that `wandb sync` would send."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    launches = []
    for path in sorted((run.path / "wandb").glob("offline-run-*/*.wandb")):
        values, name, key = dict[str, Any](), "", ""
        for data in records(path.read_bytes()):
            record = Record.FromString(data)
            if record.WhichOneof("record_type") == "run":
                name, key = record.run.display_name, record.run.run_id
            for item in record.history.item:
                values["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
        launches.append((key, name, values))
    return launches


def records(log: bytes) -> Iterator[bytes]:
    """Of a log in LevelDB's format: blocks of 32 KiB, in which each fragment has a checksum, its length, and whether it
    is a whole record, the first, a middle or the last part of one. wandb's has a header of seven bytes."""
    at, record = 7, b""
    while at + 7 <= len(log):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
            continue
        length, kind = struct.unpack_from("<HB", log, at + 4)
        record += log[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


@pytest.mark.slow
def test_a_run_that_was_killed_is_one_series_and_one_run_with_each_step_once(digits: Dataset, tmp_path: Path) -> None:
    config = tracked(digits, tmp_path, "tensorboard", "wandb")
    run = RunFolder(tmp_path / "tracked")
    killed_at(run.grid(8), config, tmp_path / "log")
    trained(changed(config, training={"steps": 10}))
    killed_at(run.checkpoint(12), config, tmp_path / "log")  # in the midst of its evaluation
    trained(config)

    assert [path.parent for path in run.path.rglob("events.out.tfevents.*")] == [run.trackers] * 4
    events = EventAccumulator(str(run.trackers), size_guidance={IMAGES: 0}).Reload()
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[0].keys() == {"step", *NAMES.values()}
    for name, key in NAMES.items():
        assert [event.step for event in events.Scalars(name)] == list(range(1, STEPS + 1)), key
        expected = [np.float32(line[key]) for line in lines]
        assert [event.value for event in events.Scalars(name)] == expected, key
    evaluated = [4, 8, 10, 12, STEPS]  # 10 was the last step of the second launch
    for key in ("fid", "is_mean", "kid_mean", "fid_floor", "precision"):
        scores = [json.loads(run.scores(step).read_text())["features"]["mnist"][key] for step in evaluated]
        events_of_key = events.Scalars(f"score/mnist/{key}")
        assert [event.step for event in events_of_key] == evaluated
        assert [event.value for event in events_of_key] == [np.float32(score) for score in scores]
    grids = events.Images("samples")
    assert [event.step for event in grids] == list(range(2, STEPS + 1, 2))
    with Image.open(run.grid(STEPS)) as image:
        assert (grids[-1].width, grids[-1].height) == image.size
    start = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    settings = metadata.parse_session_start_info_plugin_data(start).hparams
    assert settings["training.batch_size"].number_value == 16
    assert settings["training.objective"].string_value == "wgan"
    assert not {"training.clip_value", "run.name", "training.steps"} & set(settings)  # the default, or free
    experiment = events.SummaryMetadata("_hparams_/experiment").plugin_data.content
    columns = [column.name.tag for column in metadata.parse_experiment_plugin_data(experiment).metric_infos]
    assert columns == ["score/mnist/fid", "score/mnist/is_mean"]

    key = json.loads(run.tracker_runs.read_text())["wandb"]
    assert [path.name[-len(key) - 1 :] for path in (run.path / "wandb").glob("offline-run-*")] == [f"-{key}"] * 4
    # wandb writes blocks: of the processes that were killed there may be nothing.
    launches = wandb_history(run)[1::2]
    assert [launched[:2] for launched in launches] == [(key, "tracked")] * 2
    last = launches[-1][2]
    assert last["_step"] == STEPS
    assert math.isclose(last["score/mnist/fid"], json.loads(run.scores(STEPS).read_text())["features"]["mnist"]["fid"])
    assert last["samples/_type"] == "images/separated"
    assert last["loss/critic"] == lines[-1]["critic_loss"]


def test_a_tracker_that_does_not_open_is_one_line(digits: Dataset, tmp_path: Path) -> None:
    config = changed(
        tracked(digits, tmp_path, "tensorboard"), run={"tracker_options": {"tensorboard": {"entity": "we"}}}
    )
    result = launch(TRAIN, flags(config))
    assert result.returncode == 2
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: run.trackers: tensorboard can't be opened (")
    assert "unexpected keyword argument 'entity'" in last
    assert "Traceback" not in result.stderr
