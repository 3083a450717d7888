"""What a critic's scores say of images that it has not seen."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline import evaluate, train
from pipeline.config import EvaluationConfig, NetworkConfig, RuntimeConfig
from pipeline.data import Dataset
from pipeline.data.resident import load_split
from pipeline.distributed.collectives import Ranks
from pipeline.distributed.process import Runtime
from pipeline.evaluation.evaluate import MOST_SCORED_BY_CRITIC, critic_estimates, share_of_real_images
from pipeline.evaluation.scorer import Scorer
from pipeline.evaluation.targets import score_target
from pipeline.models.networks import Critic, initialise
from pipeline.rng import sampling_order, seeded
from pipeline.storage.run_folder import RunFolder
from tests.export.generators import random_generator, saved_run
from tests.jobs import restoring_process, tiny_config

ALONE = Ranks()


class FirstPixel(Critic):
    """Scores images by the pixel at their lower right, which the mirrored networks see at the upper left."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.score = nn.Linear(1, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        return images[:, 0, 0, 0], None


def images(*pixels: int) -> Tensor:
    made = torch.zeros(len(pixels), 1, 2, 2, dtype=torch.uint8)
    made[:, 0, 1, 1] = torch.tensor(pixels, dtype=torch.uint8)
    return made


def test_estimates_by_hand() -> None:
    """Scores 0.8 and 1, 0.6 and 0.8, 0.2: gaps 0.7 and 0.5, 0.2 between them; standard errors 0.1 / root 2 each."""
    shares = {"train": images(204, 255), "test": images(153, 204), "generated": images(51)}
    found: Any = critic_estimates(FirstPixel(), shares, ALONE)
    assert found["mean_scores"] == pytest.approx({"train": 0.9, "test": 0.7, "generated": 0.2}, rel=1e-6)
    assert found["images"] == {"train": 2, "test": 2, "generated": 1}
    assert (found["train_gap"], found["test_gap"]) == pytest.approx((0.7, 0.5), rel=1e-6)
    assert found["overfitting"] == pytest.approx(2 / 7, rel=1e-6)
    assert found["overfitting_error"] == pytest.approx(math.sqrt(2 * 0.1**2 / 2) / 0.7, rel=1e-6)


def test_a_critic_that_holds_generated_images_for_more_real_has_no_overfitting_to_tell() -> None:
    found = critic_estimates(FirstPixel(), {"train": images(9), "test": images(9), "generated": images(200)}, ALONE)
    assert found["overfitting"] is found["overfitting_error"] is None
    json.dumps(found, allow_nan=False)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_a_critic_of_few_images_learns_them_by_heart(seed: int, digits: Dataset) -> None:
    """Trained on 60 digits, with noise and some other digits as what is generated, it soon tells these 60 from digits
    that are neither; of 1,000 it does not."""
    train, test = (load_split(digits, split)[0] for split in ("train", "test"))
    random = torch.Generator().manual_seed(seed)
    fakes = train.flatten()[torch.randint(train.numel(), (1000, 784), generator=random)].view(-1, 1, 28, 28)

    def overfitting(count: int) -> float:
        critic = Critic(NetworkConfig(width=0.2), (1, 28, 28))
        initialise(critic, seeded(seed, "critic"))
        optimizer = torch.optim.Adam(critic.parameters(), 2e-3)
        for _ in range(80):
            rows, others = (torch.randint(size, (60,), generator=random) for size in (count, 1000))
            real, fake = (part[chosen].flip(2, 3) / 255 for part, chosen in ((train, rows), (fakes, others)))
            loss = nn.functional.softplus(-critic(real)[0]).mean() + nn.functional.softplus(critic(fake)[0]).mean()
            other = test[torch.randint(300, (60,), generator=random)].flip(2, 3) / 255
            loss = loss + nn.functional.softplus(critic(other)[0]).mean()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
        shares = {"train": train[:count], "test": test[300:], "generated": fakes}
        found: Any = critic_estimates(critic, shares, ALONE)["overfitting"]
        return float(found)

    assert overfitting(60) > overfitting(1000) + 0.1


def test_real_images_are_the_same_for_any_number_of_ranks(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.evaluation.evaluate.MOST_SCORED_BY_CRITIC", 330)
    whole, _ = load_split(digits, "train")
    chosen = sampling_order(torch.arange(1150)).argsort()[:330].sort().values
    for world_size in (1, 3):
        shares = [share_of_real_images(digits, "train", Ranks(rank, world_size)) for rank in range(world_size)]
        assert torch.equal(torch.cat(shares), whole[chosen])
    assert MOST_SCORED_BY_CRITIC == 2000


@pytest.mark.slow
def test_scores_of_a_run_tell_of_its_critic(digits: Dataset, tmp_path: Path) -> None:
    """Where a checkpoint holds one, and the dataset is the one that it was trained on."""
    generator = random_generator()
    critic = Critic(generator.config, generator.image_shape)
    initialise(critic, seeded(0, "critic"))
    run = saved_run(RunFolder(tmp_path / "runs/run"), generator, digits.fingerprint, 10, critic=critic)
    without = saved_run(RunFolder(tmp_path / "runs/without"), generator, digits.fingerprint, 10)
    other = saved_run(RunFolder(tmp_path / "runs/other"), generator, "0" * 64, 10, critic=critic)
    with restoring_process():
        scorer = Scorer(EvaluationConfig(num_images=250), digits, Runtime(RuntimeConfig(device="cpu", threads=1)), 0)
        for folder, out in ((run, None), (without, None), (other, tmp_path / "other.json")):
            score_target(folder.path, scorer, [10], out, tmp_path / "runs")
    found = json.loads(run.scores(10).read_text())["critic"]
    assert found["images"] == {"train": 1150, "test": 610, "generated": 250}
    splits = {split: load_split(digits, split)[0] for split in ("train", "test")}
    means: Any = critic_estimates(critic, splits | {"generated": splits["test"]}, ALONE)["mean_scores"]
    for split in splits:
        assert found["mean_scores"][split] == pytest.approx(means[split], rel=1e-6)
    assert "critic" not in json.loads(without.scores(10).read_text())
    assert "critic" not in json.loads((tmp_path / "other.json").read_text())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_critic_of_classes_is_left_out(scored_digits: Dataset, tmp_path: Path) -> None:
    """Its score alone, without the class's logit, tells nothing; in training and from a checkpoint."""
    for objective, has_scores in (("crpgan", False), ("acgan", True)):
        config = tiny_config(
            data={"dataset": str(scored_digits.folder)},
            run={"root": str(tmp_path), "name": objective},
            training={"objective": objective, "clip_value": None, "steps": 2, "n_critic": 1, "batch_size": 8},
            evaluation={"every": 2, "num_images": 250},
        )
        run = train(config)
        [path] = run.folder.path.glob("evaluation/step-*.json")
        assert ("critic" in json.loads(path.read_text())) == has_scores
        [scores] = evaluate(run.folder.path, out=tmp_path / f"{objective}.json")
        assert ("critic" in scores) == has_scores
