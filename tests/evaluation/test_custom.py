"""Feature networks of the user's own, by name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from pipeline.config import EvaluationConfig
from pipeline.data import Dataset
from pipeline.data.resident import load_split
from pipeline.errors import UserError
from pipeline.evaluation.features import FeatureExtractor, load_features

CPU = torch.device("cpu")
SOURCE = '''
from pathlib import Path
import torch

Path("imported").touch()

class Means(torch.nn.Module):
    """Mean brightness of rows, and as logits of columns."""

    def __init__(self, factor=1.0):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(factor))

    def forward(self, images):
        pixels = images.double() * self.factor
        return pixels.mean((1, 3)), pixels.mean((1, 2))

twice = Means(2.0)
number = 7

def wrong():
    return torch.nn.Flatten(0)

def of_images(images):
    return images.flatten(1)

class Failing(torch.nn.Module):
    def forward(self, images):
        raise RuntimeError("first line\\nno such device")
'''


def load(name: str, dataset: Dataset) -> FeatureExtractor:
    return load_features(name, dataset, CPU, EvaluationConfig())


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of another name in each test, in the working directory."""
    name = f"features_of_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return name


def test_a_module_by_name_is_a_feature_space(digits: Dataset, module: str, tmp_path: Path) -> None:
    load("mnist", digits)
    assert not (tmp_path / "imported").exists()
    means, twice = load(f"{module}:Means", digits), load(f"{module}:twice", digits)
    assert (tmp_path / "imported").exists()
    images, _ = load_split(digits, "test")
    features, logits = means(images)
    assert features.dtype == logits.dtype == torch.float32
    torch.testing.assert_close(features, images.float().mean((1, 3)))
    torch.testing.assert_close(twice(images)[1], 2 * images.float().mean((1, 2)))
    assert (means.name, means.num_classes) == (f"{module}:Means", 28)
    assert load(f"{module}:Means", digits).fingerprint == means.fingerprint
    Path(f"{module}.py").write_text(SOURCE + "# changed\n")
    assert load(f"{module}:Means", digits).fingerprint != means.fingerprint
    with torch.no_grad():
        sys.modules[module].twice.factor += 1
    changed = load(f"{module}:twice", digits)
    assert changed.fingerprint not in (means.fingerprint, twice.fingerprint)


@pytest.mark.parametrize(
    ("attribute", "words"),
    [
        ("missing", "has no attribute 'missing'"),
        ("number", "that is a int, not a torch module"),
        (
            "wrong",
            r"was given uint8 \[2, 1, 28, 28\] and failed: it returned \[1568\], not a row for",
        ),
        ("of_images", r"is called without arguments, to return a module, and failed: TypeError: of_images\(\) "),
        ("Failing", r"and failed: RuntimeError: no such device"),
    ],
)
def test_what_is_wrong_with_a_module_is_told(attribute: str, words: str, digits: Dataset, module: str) -> None:
    with pytest.raises(UserError, match=rf"evaluation\.features.*{module}:{attribute}.*{words}") as refused:
        load(f"{module}:{attribute}", digits)
    assert "\n" not in str(refused.value)


def test_a_torchscript_file_is_refused_with_what_to_do(digits: Dataset) -> None:
    with pytest.raises(UserError, match=r"'torchscript:rows\.pt': load the file in a module of yours"):
        load("torchscript:rows.pt", digits)
