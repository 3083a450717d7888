"""A GAN training pipeline: its interface for Python, whose functions the programs call too.

Names are imported when they are used, so that `import pipeline` takes no torch.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from pkgutil import resolve_name
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Literal, cast

if TYPE_CHECKING:
    from pipeline.config import Config, configure
    from pipeline.data.prepare import prepare_dataset, prepare_folder, prepare_mnist, prepare_npz
    from pipeline.evaluation import Scores
    from pipeline.export.generator_file import load_generator
    from pipeline.export.images import render_range
    from pipeline.reporting.read import Run, read_run

__version__ = "0.3.0"

__all__ = [
    "Config",
    "Run",
    "configure",
    "evaluate",
    "load_generator",
    "prepare_dataset",
    "prepare_folder",
    "prepare_mnist",
    "prepare_npz",
    "read_run",
    "render_range",
    "train",
]

_HOMES = {
    **dict.fromkeys(("Config", "configure"), "pipeline.config"),
    **dict.fromkeys(("prepare_dataset", "prepare_folder", "prepare_mnist", "prepare_npz"), "pipeline.data.prepare"),
    "load_generator": "pipeline.export.generator_file",
    "render_range": "pipeline.export.images",
    **dict.fromkeys(("Run", "read_run"), "pipeline.reporting.read"),
}


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return resolve_name(f"{_HOMES[name]}:{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """The package's type: `train` and `evaluate` stay functions when the programs of these names are imported as
    modules, which would otherwise replace them."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def _is_program() -> bool:
    """Returns whether a program of this package is starting, not a user's that imports the package."""
    as_module = sys.argv[0] == "-m" and any(argument.startswith("pipeline.") for argument in sys.orig_argv)
    return as_module or Path(sys.argv[0]).absolute().parent == Path(__file__).parent


if _is_program() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # What a program imports before `run_program` handles ^C takes a second or two: it ends without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def train(config: Config | str | Path, settings: Mapping[str, object] = MappingProxyType({})) -> Run:
    """Trains the run that the configuration describes, from its newest checkpoint if there is one, and returns what its
    folder then holds: `log` has the metrics, `evaluations` the scores, `grids` the samples' PNG files.

    `train("quickstart", {"training.steps": 500})` takes a configuration's name or path and, by their dotted keys,
    settings in place of some of its values; `train(config)` takes a `Config`.

    It may be called in a single process, or on all ranks that a launcher started. While it runs, SIGINT (a notebook's
    interrupt), SIGTERM and SIGUSR1 stop it after saving; a second SIGINT stops it at once. The process gets back its
    signal handlers, cores, threads and arithmetic.

    Raises:
        UserError: the configuration contradicts itself, the number of ranks, the dataset or the run's folder.
        Preempted: the run was stopped; called again it goes on.
        TrainingFailed: a loss, gradient or weight is not finite, replicas differ, or saving failed too often.
    """
    from pipeline.config import Config, configure
    from pipeline.distributed.failures import closing
    from pipeline.distributed.process import Runtime, restoring_process
    from pipeline.errors import UserError
    from pipeline.reporting.read import read_run
    from pipeline.storage.run_folder import RunFolder
    from pipeline.training.trainer import Trainer

    if not isinstance(config, Config):
        config = configure(config, settings)
    elif settings:
        raise UserError(f"settings {dict(settings)} go with a configuration's name or path: put them into the Config")
    folder = RunFolder(config.folder)
    with restoring_process(), closing(Runtime(config.runtime), config) as runtime:
        Trainer(config, runtime).run()
        return runtime.ranks.on_main(lambda: read_run(folder.path))


def evaluate(
    target: str | Path,
    config: Config | str | Path | None = None,
    *,
    real: str | Path | None = None,
    kind: str = "own",
    steps: Sequence[int] | Literal["newest", "all"] = "newest",
    out: str | Path | None = None,
    crop: int | None = None,
    size: int | None = None,
) -> list[Scores]:
    """Scores images and returns what was written: a dict for each checkpoint, with the scores in
    ["features"][FEATURE SPACE][SCORE].

    Args:
        target: a run's folder, an exported generator (.safetensors, .h5, .keras, hf://OWNER/NAME), a folder of images,
            an .npz file, or the word train or test for that split of the real images.
        config: a Config, or a configuration's name or path; by default that of the run, or else the defaults.
        real: a folder of images or an .npz file to compare with, in the place of the configured dataset.
        kind: what the images of `real` are; with "mnist" they may be scored by the features of digits.
        steps: steps of the run's checkpoints to score.
        out: path of the scores; by default they go into the run, or into evaluations/ under run.root.
        crop: side of the centre square that is cut out of images in files first.
        size: side that images in files are resized to, after their centre square is cut out.

    Raises:
        UserError: the target is none of these, is damaged or does not suit the dataset; or other scores are there
            already.
        Preempted: the evaluation was stopped.
    """
    from pipeline.config import Config, configure
    from pipeline.distributed.failures import closing
    from pipeline.distributed.process import Runtime, restoring_process
    from pipeline.errors import UserError
    from pipeline.evaluation.scorer import Scorer
    from pipeline.evaluation.targets import check_run, real_dataset, score_target
    from pipeline.storage.run_folder import RunFolder, scores_of

    if isinstance(steps, int | str) and steps not in ("newest", "all"):
        raise UserError(f"steps is {steps!r}: give a list of steps, 'newest' or 'all'")
    if (out or real) and steps != "newest" and (steps == "all" or len(steps) != 1):
        raise UserError(f"steps is {steps}: with `out` or `real` it must be one step, as the scores are one file")
    run = RunFolder(Path(target))
    if not isinstance(config, Config):
        config = configure(config or (run.config if run.config.is_file() else None))
    root, scores = Path(config.run.root), Path(out) if out else None
    if real and not scores:
        scores = scores_of(Path(f"{Path(target).name}-{Path(real).name}"), root)
    with (
        restoring_process(),
        closing(Runtime(config.runtime), config) as runtime,
        real_dataset(real, config, runtime.ranks, kind, crop, size) as dataset,
    ):
        runtime.ranks.on_main(lambda: check_run(run, dataset))
        scorer = Scorer(config.evaluation, dataset, runtime, config.training.seed)
        wanted = [None] if steps == "newest" else None if steps == "all" else list(steps)
        code = config.network.generator
        return cast("list[Scores]", score_target(run.path, scorer, wanted, scores, root, code, crop, size))
