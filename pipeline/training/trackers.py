"""What experiment trackers get of a run, settings, numbers, scores and images, and how each goes on with a run that it
holds. A run without run.trackers does not load this file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from PIL import Image

from pipeline.config import Config, flatten
from pipeline.distributed.process import Runtime, open_tracker
from pipeline.errors import UserError
from pipeline.reporting.read import read_evaluation, read_mapping
from pipeline.storage.files import write_text
from pipeline.storage.run_folder import RunFolder


class Trackers:
    """The trackers of run.trackers, opened for a run that goes on after `step`; at 0 they get its settings. What they
    hold of later steps comes again, so TensorBoard is made to drop it.

    All ranks make the same calls; only the main rank tracks.

    Raises:
        UserError: a tracker can't be opened, as wandb where nobody is logged in.
    """

    def __init__(self, config: Config, runtime: Runtime, step: int) -> None:
        self._config, self._runtime, self._folder = config, runtime, RunFolder(config.folder)
        self._first_step = step + 1
        runtime.ranks.on_main(self._open)

    def log_line(self, line: dict[str, float]) -> None:
        """Logs a line of metrics."""
        self._log({key: value for key, value in line.items() if key != "step"}, int(line["step"]))

    def log_scores(self, step: int, *, is_new: bool) -> None:
        """Logs the scores of an evaluation, as `score/SPACE/SCORE`, from its file in the run's folder.

        Args:
            is_new: False if the file is older than this launch. Then the trackers have its scores, unless they are of a
                step that they were made to drop.
        """
        path = self._folder.scores(step)
        if self._wants(path, step, is_new) and (evaluation := read_evaluation(path, [])):
            self._log(evaluation.scores, step)

    def log_grid(self, step: int, *, is_new: bool) -> None:
        """Logs the grid of samples from its file, where accelerate's tracker takes images or files."""
        path = self._folder.grid(step)
        if self._wants(path, step, is_new):
            with self._runtime.tolerating(f"step {step}: trackers"):
                for tracker in self._runtime.accelerator.trackers:
                    _log_image(tracker, path, step)

    def _log(self, values: dict[str, float], step: int) -> None:
        with self._runtime.tolerating(f"step {step}: trackers"):
            self._runtime.accelerator.log({_tracked(key): value for key, value in values.items()}, step=step)

    def _wants(self, path: Path, step: int, is_new: bool) -> bool:
        return self._runtime.ranks.is_main and (is_new or step >= self._first_step) and path.exists()

    def _open(self) -> None:
        run, folder = self._config.run, self._folder
        identities: dict[str, str] = read_mapping(folder.tracker_runs, [])  # what trackers call this run
        for name in run.trackers:
            arguments = self._identify(name, identities) | run.tracker_options.get(name, {})
            write_text(folder.tracker_runs, json.dumps(identities))
            try:
                tracker = open_tracker(name, run.project, folder.trackers, arguments)
                self._runtime.accelerator.trackers.append(tracker)
                if self._first_step == 1:
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

    def _identify(self, name: str, identities: dict[str, str]) -> dict[str, Any]:
        """Returns the arguments with which a tracker continues the run that it has of this one."""
        run_name = self._config.run.name
        match name:
            case "tensorboard":
                return {"purge_step": self._first_step}
            case "wandb":
                key = identities.setdefault(name, uuid4().hex)
                return {"name": run_name, "id": key, "resume": "allow", "dir": str(self._folder.path)}
            case "trackio":  # it knows a run by its name alone, and runs of other roots may have the same name
                unique = identities.setdefault(name, f"{run_name}-{uuid4().hex[:8]}")
                return {"name": unique, "resume": "allow"}
            case "mlflow":
                return {"run_id": identities[name]} if name in identities else {"run_name": run_name}
        return {}


def _tracked(key: str) -> str:
    """Returns the name in trackers, which show a group together, of a number of the log or a score SPACE/SCORE:
    loss/critic, grad_norm/critic, speed/images_per_second, critic/wasserstein_estimate, score/SPACE/SCORE."""
    if "/" in key:
        return f"score/{key.replace(':', '-')}"  # some trackers take no colon
    for group in ("loss", "grad_norm"):
        if (name := key.removesuffix(f"_{group}")) != key:
            return f"{group}/{name}"
    return f"speed/{key}" if "second" in key else f"critic/{key}"


def _log_settings(tracker: Any, config: Config) -> None:
    """Gives a tracker all settings, and TensorBoard's table, which has a column for each, those worth one."""
    settings = {
        key: item if isinstance(item, int | float | str) else str(item) for key, item in flatten(config).items()
    }
    if tracker.name != "tensorboard":
        tracker.store_init_configuration(settings)
        return
    # accelerate would write them as a series of their own, named after the time. In the run's series TensorBoard shows
    # them beside its scores.
    from torch.utils.tensorboard.summary import hparams

    usual = flatten(Config()) | {"training.objective": None, "training.seed": None}
    columns = {key: settings[key] for key, value in flatten(config, free=False).items() if value != usual[key]}
    scores = {_tracked(f"{space}/{key}"): 0.0 for space in config.evaluation.features for key in ("fid", "is_mean")}
    for summary in hparams(columns, scores):  # type: ignore[no-untyped-call]
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
