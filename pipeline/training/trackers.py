"""What experiment trackers (TensorBoard, wandb, ...) get beside the lines of metrics: settings, scores and grids of
samples; and how a resumed run goes on in them.

accelerate opens the trackers and gives them their numbers. This file adds what accelerate leaves out: each tracker's
way to continue a run and to take an image.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from PIL import Image

from pipeline.config import Config, flatten
from pipeline.distributed.process import Runtime, open_tracker
from pipeline.errors import UserError
from pipeline.storage.files import write_text
from pipeline.storage.run_folder import RunFolder


class Trackers:
    """The trackers of run.trackers. Every rank may call any method; only the main rank tracks."""

    def __init__(self, config: Config, runtime: Runtime, folder: RunFolder) -> None:
        self._config, self._runtime, self._folder = config, runtime, folder
        self._first_step = 0

    def begin(self, step: int) -> None:
        """Opens the trackers of a run that goes on after `step`; at 0 they get its settings.

        What they hold of later steps comes again, so TensorBoard is made to drop it.

        Raises:
            UserError: a tracker can't be opened, as wandb where nobody is logged in.
        """
        self._first_step = step + 1
        if self._config.run.trackers:
            self._runtime.ranks.on_main(lambda: self._open(step))

    def log_scores(self, step: int, *, is_new: bool) -> None:
        """Logs the scores of an evaluation, as `SPACE/SCORE`, from its file in the run's folder.

        Args:
            is_new: False if the file is older than this launch. Then the trackers have its scores, unless they are of a
                step that they were made to drop.
        """
        path = self._folder.scores(step)
        if self._wants(path, step, is_new):
            with self._runtime.tolerating(f"step {step}: trackers"):
                spaces = json.loads(path.read_text())["features"].items()
                scores = {
                    f"{space.replace(':', '-')}/{key}": value
                    for space, values in spaces
                    for key, value in values.items()
                    if isinstance(value, int | float)
                }
                self._runtime.accelerator.log(scores, step=step)

    def log_grid(self, step: int, *, is_new: bool) -> None:
        """Logs the grid of samples from its file, where accelerate's tracker takes images or files."""
        path = self._folder.grid(step)
        if self._wants(path, step, is_new):
            with self._runtime.tolerating(f"step {step}: trackers"):
                for tracker in self._runtime.accelerator.trackers:
                    _log_image(tracker, path, step)

    def _wants(self, path: Path, step: int, is_new: bool) -> bool:
        known = not is_new and step < self._first_step
        return bool(self._runtime.accelerator.trackers) and not known and path.exists()

    def _open(self, step: int) -> None:
        run, folder, identities = self._config.run, self._folder, self._read_identities()
        for name in run.trackers:
            arguments = self._identify(name, identities, step) | run.tracker_options.get(name, {})
            write_text(folder.tracker_runs, json.dumps(identities))
            try:
                tracker = open_tracker(name, run.project, folder.trackers, arguments)
                self._runtime.accelerator.trackers.append(tracker)
                if step == 0:
                    _log_settings(tracker, self._config)
            except Exception as error:  # a tracker's package may raise anything
                reason = next(iter(str(error).splitlines()), "") or type(error).__name__
                raise UserError(
                    f"run.trackers: {name} can't be opened ({reason}); {folder.tracker_runs} says which run of it this "
                    "one goes on in, run.tracker_options what else it is given"
                ) from error
            if name == "mlflow":
                identities[name] = tracker.tracker.info.run_id
                write_text(folder.tracker_runs, json.dumps(identities))

    def _read_identities(self) -> dict[str, str]:
        """Returns the trackers' names of this run, which it got at its first launch."""
        with contextlib.suppress(OSError, ValueError):
            identities = json.loads(self._folder.tracker_runs.read_text())
            return identities if isinstance(identities, dict) else {}
        return {}

    def _identify(self, name: str, identities: dict[str, str], step: int) -> dict[str, Any]:
        """Returns the arguments with which a tracker continues the run that it has of this one."""
        run_name, place = self._config.run.name, str(self._folder.path)
        match name:
            case "tensorboard":
                return {"purge_step": step + 1}
            case "wandb":
                key = identities.setdefault(name, uuid4().hex)
                return {"name": run_name, "id": key, "resume": "allow", "dir": place}
            case "trackio":  # it knows a run by its name alone, and runs of other roots may have the same name
                unique = identities.setdefault(name, f"{run_name}-{uuid4().hex[:8]}")
                return {"name": unique, "resume": "allow"}
            case "mlflow":
                return {"run_id": identities[name]} if name in identities else {"run_name": run_name}
        return {}


def _log_settings(tracker: Any, config: Config) -> None:
    plain = {
        key: value if isinstance(value, int | float | str) else str(value) for key, value in flatten(config).items()
    }
    if tracker.name != "tensorboard":
        tracker.store_init_configuration(plain)
        return
    # accelerate would write them as a series of their own, named after the time. In the run's series TensorBoard shows
    # them beside its scores.
    from torch.utils.tensorboard.summary import hparams

    scores = {f"{space.replace(':', '-')}/fid": 0.0 for space in config.evaluation.features}
    for summary in hparams(plain, scores):  # type: ignore[no-untyped-call]
        tracker.tracker.file_writer.add_summary(summary)


def _log_image(tracker: Any, path: Path, step: int) -> None:
    with Image.open(path) as file:
        image = file.convert("RGB")
    match tracker.name:
        case "tensorboard":
            tracker.log_images({"samples": np.asarray(image).transpose(2, 0, 1)[None]}, step=step)
        case "aim" | "clearml":
            tracker.log_images({"samples": image}, step=step)
        case "mlflow":
            tracker.log_artifact(str(path), path.parent.name)
        case _ if hasattr(tracker, "log_images"):
            tracker.log_images({"samples": [image]}, step=step)
