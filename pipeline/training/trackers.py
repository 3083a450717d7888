"""What experiment trackers (TensorBoard, wandb, ...) get of a run beside its lines of metrics, and how a run that is
resumed goes on in them."""

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
    """Those of run.trackers. All methods are for every rank; the main rank alone tracks."""

    def __init__(self, config: Config, runtime: Runtime, folder: RunFolder) -> None:
        self._config, self._runtime, self._folder = config, runtime, folder
        self._first_step = 0

    def begin(self, step: int) -> None:
        """Opens the trackers of a run that goes on after `step`; at 0 they get its settings.

        What they had of later steps is told again, so TensorBoard is made to forget it.

        Raises:
            UserError: one can't be opened, as wandb where nobody is logged in.
        """
        self._first_step = step + 1
        if self._config.run.trackers:
            self._runtime.ranks.on_main(lambda: self._open(step))

    def log_scores(self, step: int, *, is_new: bool) -> None:
        """The scores of an evaluation, as `SPACE/SCORE`, from its file in the run's folder.

        Args:
            is_new: False if the file was there before this launch: the trackers then have them unless they forgot.
        """
        path = self._folder.scores(step)
        if self._wants(path, step, is_new):
            with self._runtime.tolerating(f"step {step}: trackers"):
                spaces = json.loads(path.read_text())["features"]
                scores = {
                    f"{space.replace(':', '-')}/{key}": value
                    for space, found in spaces.items()
                    for key, value in found.items()
                    if isinstance(value, int | float)
                }
                self._runtime.accelerator.log(scores, step=step)

    def log_grid(self, step: int, *, is_new: bool) -> None:
        """The grid of samples, from its file; not to trackers for which accelerate knows neither images nor files."""
        path = self._folder.grid(step)
        if self._wants(path, step, is_new):
            with self._runtime.tolerating(f"step {step}: trackers"):
                for tracker in self._runtime.accelerator.trackers:
                    _log_image(tracker, path, step)

    def _wants(self, path: Path, step: int, is_new: bool) -> bool:
        known = not is_new and step < self._first_step
        return bool(self._runtime.accelerator.trackers) and not known and path.exists()

    def _open(self, step: int) -> None:
        run, folder, runs = self._config.run, self._folder, self._read_runs()
        for name in run.trackers:
            arguments = self._identity(name, runs, step) | run.tracker_options.get(name, {})
            write_text(folder.tracker_runs, json.dumps(runs))
            try:
                tracker = open_tracker(name, run.project, folder.trackers, arguments)
                self._runtime.accelerator.trackers.append(tracker)
                if step == 0:
                    _log_settings(tracker, self._config)
            except Exception as error:  # of any package
                reason = next(iter(str(error).splitlines()), "") or type(error).__name__
                raise UserError(
                    f"run.trackers: {name} can't be opened ({reason}); {folder.tracker_runs} says which run of it this "
                    "one goes on in, run.tracker_options what else it is given"
                ) from error
            if name == "mlflow":
                runs[name] = tracker.tracker.info.run_id
                write_text(folder.tracker_runs, json.dumps(runs))

    def _read_runs(self) -> dict[str, str]:
        """The trackers' own names of this run, which were given at its first launch."""
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(self._folder.tracker_runs.read_text())
            return found if isinstance(found, dict) else {}
        return {}

    def _identity(self, name: str, runs: dict[str, str], step: int) -> dict[str, Any]:
        """The arguments by which a tracker goes on in the run that it has of this one already."""
        run_name, place = self._config.run.name, str(self._folder.path)
        match name:
            case "tensorboard":
                return {"purge_step": step + 1}
            case "wandb":
                key = runs.setdefault(name, uuid4().hex)
                return {"name": run_name, "id": key, "resume": "allow", "dir": place}
            case "trackio":  # which knows a run by its name alone, and runs of other roots may have the same
                return {"name": runs.setdefault(name, f"{run_name}-{uuid4().hex[:8]}"), "resume": "allow"}
            case "mlflow":
                return {"run_id": runs[name]} if name in runs else {"run_name": run_name}
        return {}


def _log_settings(tracker: Any, config: Config) -> None:
    settings = flatten(config).items()
    plain = {key: value if isinstance(value, int | float | str) else str(value) for key, value in settings}
    if tracker.name != "tensorboard":
        tracker.store_init_configuration(plain)
        return
    # accelerate would make a series of its own of them, named after the time. In the run's own, TensorBoard shows them
    # beside its scores.
    from torch.utils.tensorboard.summary import hparams

    scores = {f"{space.replace(':', '-')}/fid": 0.0 for space in config.evaluation.features}
    for summary in hparams(plain, scores):  # type: ignore[no-untyped-call]
        tracker.tracker.file_writer.add_summary(summary)


def _log_image(tracker: Any, path: Path, step: int) -> None:
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    match tracker.name:
        case "tensorboard":
            tracker.log_images({"samples": np.asarray(image).transpose(2, 0, 1)[None]}, step=step)
        case "aim" | "clearml":
            tracker.log_images({"samples": image}, step=step)
        case "mlflow":
            tracker.log_artifact(str(path), path.parent.name)
        case _ if hasattr(tracker, "log_images"):
            tracker.log_images({"samples": [image]}, step=step)
