"""GAN-train: what a classifier learns from generated images and shows on real ones."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.config import EvaluationConfig, RuntimeConfig
from pipeline.data import Dataset
from pipeline.data.resident import load_split
from pipeline.distributed.collectives import Ranks
from pipeline.distributed.process import Runtime
from pipeline.errors import Preempted, UserError
from pipeline.evaluation import train_classifier
from pipeline.evaluation.extract import ImageSet
from pipeline.evaluation.interruption import interruptible
from pipeline.evaluation.scorer import Scorer
from pipeline.evaluation.targets import score_target
from pipeline.evaluation.train_classifier import gan_train
from pipeline.export.generator_file import save_export
from tests.evaluation.test_own import bright_quarters
from tests.export.generators import random_generator
from tests.jobs import restoring_process

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def quarters(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return bright_quarters(tmp_path_factory.mktemp("quarters"), (1, 12, 12), {"train": 1600, "test": 230})


def learned(dataset: Dataset, images: Tensor, labels: Tensor) -> dict[str, Any]:
    return gan_train(ImageSet.of_tensor(images, labels), dataset, 0, CPU)


@pytest.mark.slow
def test_it_falls_with_wrong_classes_and_with_missing_ones(quarters: Dataset) -> None:
    """Real images under the name of generated ones teach everything; shuffled classes nothing, three of four three
    quarters."""
    images, labels = load_split(quarters, "train")
    found = learned(quarters, images, labels)
    assert found["accuracy"] > 0.95
    assert (found["images"], found["real_images"]) == (1600, 230)
    shuffled = labels[torch.randperm(1600, generator=torch.Generator().manual_seed(0))]
    assert learned(quarters, images, shuffled)["accuracy"] < 0.6
    assert learned(quarters, images[labels < 3], labels[labels < 3])["accuracy"] == pytest.approx(0.75, abs=0.04)


def test_it_takes_the_first_images_and_can_be_interrupted(quarters: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_classifier, "GAN_TRAIN_IMAGES", 700)
    images, labels = load_split(quarters, "train")
    rendered: list[tuple[int, int]] = []

    def render(start: int, stop: int) -> Tensor:
        rendered.append((start, stop))
        return images[start:stop]

    with pytest.raises(Preempted), interruptible(Ranks(), lambda: True):
        gan_train(ImageSet(1600, render, labels), quarters, 0, CPU)
    assert rendered == [(0, 500), (500, 700)]


def test_scores_hold_it_where_it_is_asked_for(
    digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train_classifier, "GAN_TRAIN_EPOCHS", 1)
    root, path = tmp_path / "runs", tmp_path / "runs/evaluations/acgan.safetensors.json"
    save_export(random_generator(10), tmp_path / "acgan.safetensors", {})
    save_export(random_generator(), tmp_path / "wgan.safetensors", {})
    with restoring_process():
        runtime = Runtime(RuntimeConfig(device="cpu", threads=1))
        asked, plain = (
            Scorer(EvaluationConfig(num_images=200, gan_train=wanted), digits, runtime, 0) for wanted in (True, False)
        )
        with pytest.raises(UserError, match=r"evaluation\.gan_train is true, but the images were asked for no classes"):
            score_target(tmp_path / "wgan.safetensors", asked, None, None, root)
        assert not root.exists()
        score_target(tmp_path / "acgan.safetensors", asked, None, None, root)
        found = json.loads(path.read_text())["gan_train"]
        assert 0 < found.pop("accuracy") < 0.6, "random images teach nothing"
        assert found == {"images": 200, "real_images": 610}
        assert re.search(r"recall [\d.]+, \d+ modes?, KL [\d.]+; GAN-train [\d.]+%\n$", capfd.readouterr().err)
        score_target(tmp_path / "acgan.safetensors", plain, None, None, root)
        assert "gan_train" in json.loads(path.read_text()), "what was measured before is kept"
