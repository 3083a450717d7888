"""Run folders with every part that a run can have, and a reader of the pages about them."""

from __future__ import annotations

import dataclasses
import json
from base64 import b64decode
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.config import Config, to_yaml

VOID = {"meta", "link", "img", "input", "wbr", "br"}


class Page(HTMLParser):
    """The elements of a page, in order, with their texts; raises where elements are not properly nested."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []  # (innermost element, text)
        self._open: list[str] = []
        self.feed(self.source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip() and self._open[-1] not in ("style", "script"):
            self.texts.append((self._open[-1], " ".join(data.split())))

    @property
    def text(self) -> str:
        return " ".join(text for _, text in self.texts)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def texts_of(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag]


DATASET = "ab" * 32


def make_run(
    folder: Path, fid: float = 45.2, n_critic: int = 2, num_images: int = 10_000, dataset: str = DATASET
) -> Path:
    """A finished run of 3,000 steps with every part that a run can have."""
    config = Config()
    run = dataclasses.replace(config.run, name="made")
    training = dataclasses.replace(config.training, steps=3000, n_critic=n_critic, clip_value=0.03)
    (folder / "samples").mkdir(parents=True)
    (folder / "evaluation").mkdir()
    (folder / "config.yaml").write_text(to_yaml(dataclasses.replace(config, run=run, training=training)))
    environment = {
        **{"date": "2026-11-30 19:02 UTC", "command": "gan-pipeline train --config wgan", "git_commit": "3f7c2a9"},
        **{"packages": {"torch": "2.15.0"}, "world_size": 2, "device": "4 x Xeon", "devices": {"core": 4}},
        **{"threads_per_rank": 2, "weights": {"generator": 34184, "critic": 66056}, "dataset_fingerprint": dataset},
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    random = np.random.default_rng(0)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(50, 3001, 50):
            values = {
                "step": step,
                "critic_loss": -0.2 / step,
                "generator_loss": float(random.normal()),
                "wasserstein_estimate": 0.4 / step,
                "clipped_fraction": 0.5,
                "critic_grad_norm": 30.0 / step,
                "images_per_second": 400.0 + step % 100,
                "data_wait_seconds": 0.5,
                "elapsed_seconds": 0.3 * step,
                "evaluation_seconds": 50.0 * (step // 1000),
            }
            file.write(json.dumps(values) + "\n")
    for step in (1000, 2000, 3000):
        scores = {
            "fid": fid * 3000 / step,
            "fid_floor": 0.904,
            "fid_infinite": fid * 2900 / step,
            "fid_interval": [fid * 2950 / step, fid * 3050 / step],
            "is_mean": 9.0 + step / 10_000,
            "is_std": 0.06,
            "kid_mean": 0.03,
            "kid_std": 0.004,
            "precision": 0.8,
            "recall": 0.6,
            "density": 0.75,
            "coverage": None,
            "sliced_wasserstein": 1.25,
            "sliced_wasserstein_floor": 0.11,
            "authenticity": 0.481,
            "authenticity_real": 0.479,
            "modes": 10.0,
            "mode_kl": 0.0721,
            "mode_kl_floor": 0.00188,
            "mode_kl_interval": [0.07, 0.0742],
            "class_accuracy": 0.915,
            "class_histogram": {str(digit): 0.05 + digit / 90 for digit in range(10)},
            "class_histogram_real": {str(digit): 0.1 for digit in range(10)},
            "class_total_variation": 0.1389,
            "confidence_mean": 0.93,
            "fid_per_class": {str(digit): 60.0 + digit if digit != 4 else None for digit in range(10)},
            "fid_per_class_floor": {str(digit): 4.0 + digit / 10 for digit in range(10)},
            "nearest_training_images": {"indices": [[1, 2, 3]] * 8, "among": 50_000},
            "images": {
                **{
                    "fid": [num_images, 60_000],
                    "fid_floor": num_images,
                    "fid_per_class_floor": 10_000,
                    "modes_floor": num_images,
                },
                **{"kid": [num_images, 50_000], "manifold": [num_images, num_images]},
                **{"authenticity": [1000, 50_000], "authenticity_real": 990},
            },
            "provenance": {
                "extractor": "cd" * 32,
                "dataset": dataset,
                "classifier_test_accuracy": 0.995,
                "neighbours": 3,
            },
        }
        critic = {
            "images": {"train": 2000, "test": 1995, "generated": 1990},
            **{"train_gap": 0.02, "test_gap": 0.02 - 1e-6 * step, "overfitting": 0.15, "overfitting_error": 0.021},
        }
        content = {"step": step, "num_images": num_images, "reference": "train", "weights": "ema", "critic": critic}
        content["gan_train"] = {"accuracy": 0.876, "images": num_images, "real_images": 10_000}
        path = folder / "evaluation" / f"step-{step:08d}.json"
        path.write_text(json.dumps(content | {"features": {"mnist": scores}}))
    for step in range(500, 3001, 500):
        save_image(folder / "samples" / f"{step:05d}.png", (122, 122), step)
    save_image(folder / "samples" / "03000-interpolation.png", (302, 122), 1)
    save_image(folder / "evaluation" / "neighbours-00003000.png", (302, 122), 2)
    save_image(folder / "evaluation" / f"real-{dataset[:12]}.png", (122, 122), 3)
    return folder


def save_image(path: Path, size: tuple[int, int], seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0]), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def decoded(uri: str | None) -> Image.Image:
    assert uri is not None
    return Image.open(BytesIO(b64decode(uri.partition(",")[2])))
