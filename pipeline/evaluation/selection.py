"""The best checkpoint of a run by a score of its evaluations, and when to stop waiting for a better one.

Nothing is remembered: every answer is read from the scores and checkpoints in the run's folder, so a run that was
killed at any moment gives the same answers. The score that chose a checkpoint is too good, being the best of several;
what is reported of the checkpoint is measured on images of other latents.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.evaluation.scorer import Scorer
from pipeline.export.generator_file import critic_of, generator_of, save_export
from pipeline.reporting import SCORES
from pipeline.reporting.read import Evaluation, read_evaluations, read_mapping
from pipeline.rng import fresh_seed
from pipeline.storage.checkpoint import Checkpoint, CheckpointError, find
from pipeline.storage.run_folder import RunFolder

LOWER_IS_BETTER = {key: score.lower_is_better for key, score in SCORES.items() if score.lower_is_better is not None}
"""The scores by which a checkpoint can be chosen, as the files of scores name them."""


def named_score(name: str, spaces: list[str], setting: str = "run.keep_best") -> tuple[str, str]:
    """Returns the feature space and the score that a name like `fid` (in the first space) or `mnist.fid` means. Raises
    UserError, which names the setting, for an unknown score and for a space that evaluation.features does not hold."""
    space, _, key = name.rpartition(".")
    if key not in LOWER_IS_BETTER:
        raise UserError(
            f"{setting} is {name}, which is no score to choose by: name one of {', '.join(LOWER_IS_BETTER)}"
        )
    if (space or not spaces) and space not in spaces:
        raise UserError(f"{setting} is {name}, but evaluation.features {spaces} lacks its space: add it there")
    return space or spaces[0], key


class Selection:
    """Keeps the checkpoint with the best score (`run.keep_best`) and ends a run whose score stops improving
    (`run.patience`). Only the main rank may call it, `export` excepted. Raises UserError, see `named_score`."""

    def __init__(self, config: Config) -> None:
        self.space, self.key = named_score(str(config.run.keep_best), config.evaluation.features)
        self._config, self._folder = config, RunFolder(config.folder)
        self._settings = {key: getattr(config.evaluation, key) for key in ("weights", "num_images", "reference")}
        self._settings["seed"] = config.training.seed

    def evaluations(self, last_step: int) -> list[Evaluation]:
        """Returns the training's evaluations up to a step that were made with the present settings, oldest first."""
        every, end = self._config.evaluation.every, self._config.training.steps
        neighbours = self._config.evaluation.neighbours
        return [
            item
            for item in read_evaluations(self._folder, [])
            if ((every and item.step % every == 0) or item.step == end)
            and item.step <= last_step
            and self._settings.items() <= item.settings.items()
            and item.conditions(self.space, self.key).get("neighbours", neighbours) == neighbours
        ]

    def ranked(self, steps: Iterable[int]) -> list[Evaluation]:
        """Returns the evaluations of these steps that have the score, the best first; of equal ones the earlier."""
        sign, wanted = 1 if LOWER_IS_BETTER[self.key] else -1, set(steps)
        items = [item for item in self.evaluations(max(wanted, default=0)) if item.step in wanted]
        scores = {item.step: score for item in items if (score := item.score(self.space, self.key)) is not None}
        return sorted((item for item in items if item.step in scores), key=lambda item: sign * scores[item.step])

    def best_of(self, steps: list[int]) -> int | None:
        """Returns the best of these steps; None if none of them has the score."""
        return next((item.step for item in self.ranked(steps)), None)

    def is_over(self, step: int) -> bool:
        """Returns whether none of the last run.patience evaluations up to a step beats those before."""
        patience, steps = self._config.run.patience, [item.step for item in self.evaluations(step)]
        best = self.best_of(steps) or 0
        return patience is not None and sum(other > best for other in steps) >= patience

    def export(self, scorer: Scorer, last_step: int) -> None:
        """Exports the best intact checkpoint up to a step, and scores it on images of other latents than those that
        chose it. What exists already is left alone. Every rank must call it. Raises Preempted when a signal came."""
        runtime, folder, weights = scorer.runtime, self._folder, self._config.evaluation.weights
        choice, damaged = runtime.ranks.on_main(lambda: self._best_intact(last_step))
        for message in damaged:
            runtime.print(f"skipped a damaged checkpoint: {message}")
        if choice is None:
            runtime.print(f"no checkpoint has a {self.space} {self.key}: none is exported as the best")
            return
        checkpoint, evaluation, count = choice
        generator = generator_of(checkpoint, weights, self._config.network.generator).to(runtime.device)
        chosen_by = {"score": f"{self.space}.{self.key}", "value": evaluation.score(self.space, self.key)}
        facts: dict[str, object] = {"step": checkpoint.step, "weights": weights, "last_step": last_step}
        facts["chosen_by"] = {**chosen_by, "evaluations": count, **self._settings}
        scorer = copy.copy(scorer)
        scorer.seed = fresh_seed(self._config.training.seed)
        if not runtime.ranks.on_main(lambda: self._is_scored(facts)):
            critic = critic_of(checkpoint)
            scorer.score_generator(generator, folder.best_scores, facts, critic and critic.to(runtime.device))
        run = {"run": self._config.run.name, "step": checkpoint.step, "dataset": scorer.dataset.fingerprint}
        runtime.ranks.on_main(lambda: save_export(generator, folder.best_export, run | {"chosen_by": chosen_by}))

    def _best_intact(self, last_step: int) -> tuple[tuple[Checkpoint, Evaluation, int] | None, list[str]]:
        """Returns the best checkpoint with its evaluation and the number of evaluations, and messages about better ones
        that are damaged."""
        damaged: list[str] = []
        for item in self.ranked([step for step in self._folder.saved_steps() if step <= last_step]):
            try:
                return (find(self._folder, item.step), item, len(self.evaluations(last_step))), damaged
            except CheckpointError as error:
                damaged.append(str(error))
        return None, damaged

    def _is_scored(self, facts: dict[str, object]) -> bool:
        """Returns whether the best checkpoint's scores are of these facts. Deletes those of a former best."""
        path = self._folder.best_scores
        if facts.items() <= read_mapping(path, []).items():
            return True
        path.unlink(missing_ok=True)
        return False
