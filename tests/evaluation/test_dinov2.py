"""The `dinov2` features on a small variant with random weights: published preprocessing, positions and class token."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.transforms import v2

from pipeline.config import EvaluationConfig
from pipeline.data import Dataset
from pipeline.errors import UserError
from pipeline.evaluation.features import FeatureExtractor, load_features
from pipeline.evaluation.features.published import Dinov2Features, positions, prepared
from tests.trap import Trap

CPU = torch.device("cpu")


def smooth_images(count: int, channels: int, height: int, width: int) -> Tensor:
    """Random images whose neighbouring pixels resemble each other, with saturated areas."""
    coarse = torch.randn(count, channels, 5, 5, generator=torch.Generator().manual_seed(0))
    fine = nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return (128 + 100 * fine).clamp(0, 255).to(torch.uint8)


def as_published(image: Tensor) -> Tensor:
    """uint8 [C, H, W] by Pillow and torchvision, as the paper's program has it."""
    array = image.permute(1, 2, 0).squeeze(2).numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy()
    resized = Image.fromarray(array).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)
    scaled = torch.from_numpy(np.array(resized)).permute(2, 0, 1) / 255
    normalised: Tensor = v2.functional.normalize(scaled, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    return normalised


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 64, 64), (3, 300, 300)])
def test_images_are_prepared_as_published(shape: tuple[int, int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (3, *shape), dtype=torch.uint8, generator=generator)
    ours, theirs = prepared(images), torch.stack([as_published(image) for image in images])
    difference = (ours - theirs).abs()
    assert difference.max() < 2.01 / 255 / 0.224, "two grey levels"
    assert (difference > 1e-5).double().mean() < 1e-3  # Pillow's weights are integers


def test_positions_are_those_of_the_authors_network() -> None:
    """Cubic convolution with a = -0.75 at (i + 0.5) * 37 / 16.1 - 0.5, written out."""

    def weight(distance: float) -> float:
        x = abs(distance)
        if x <= 1:
            return 1.25 * x**3 - 2.25 * x**2 + 1
        return -0.75 * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0

    resize = np.zeros((16, 37))
    for i in range(16):
        centre = (i + 0.5) * 37 / 16.1 - 0.5
        for tap in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            resize[i, min(max(tap, 0), 36)] += weight(centre - tap)
    embedding = torch.randn(1, 1 + 37 * 37, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    grid = embedding[0, 1:].view(37, 37, 3).numpy()
    expected = np.einsum("ai,bj,ijd->abd", resize, resize, grid).reshape(256, 3)
    found = positions(embedding)
    assert torch.equal(found[:, 0], embedding[:, 0])
    np.testing.assert_allclose(found[0, 1:].numpy(), expected, rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def small() -> nn.Module:
    """The small variant as its authors publish it, for 518 x 518, with random weights that let the image through."""
    timm = pytest.importorskip("timm")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network: nn.Module = timm.create_model("vit_small_patch14_dinov2", num_classes=0)
        for name, parameter in network.named_parameters():
            if name.endswith("gamma"):
                nn.init.ones_(parameter)
            elif name in ("pos_embed", "cls_token"):
                nn.init.normal_(parameter, std=0.5)
    return network.eval()


@pytest.fixture
def weights(small: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(Dinov2Features, "architecture", "vit_small_patch14_dinov2")
    torch.save(small.state_dict() | {"mask_token": torch.zeros(1, 384)}, tmp_path / "small.pth")
    return tmp_path / "small.pth"


def load(weights: Path, shape: tuple[int, int, int] = (1, 28, 28)) -> FeatureExtractor:
    dataset = Dataset(Path("nowhere"), "any", shape, (), {})
    return load_features("dinov2", dataset, CPU, EvaluationConfig(dinov2_weights=str(weights)))


@pytest.mark.slow
def test_features_are_the_normalised_class_token(small: nn.Module, weights: Path, tmp_path: Path) -> None:
    """By the parts of the published network, one after the other."""
    extractor = load(weights)
    images = smooth_images(3, 1, 28, 28)
    features, logits = extractor(images)
    assert features.shape == (3, extractor.num_features) == (3, 384)
    assert logits.shape == (3, extractor.num_classes) == (3, 0)
    with torch.inference_mode():
        pixels = torch.stack([as_published(image) for image in images])
        patches = nn.functional.conv2d(pixels, small.patch_embed.proj.weight, small.patch_embed.proj.bias, stride=14)  # type: ignore[union-attr, arg-type]
        tokens = torch.cat([small.cls_token.expand(3, -1, -1), patches.flatten(2).transpose(1, 2)], 1)  # type: ignore[operator]
        expected = small.norm(small.blocks(tokens + positions(small.pos_embed)))[:, 0]  # type: ignore[operator, arg-type]
    assert expected.std(0).mean() > 0.01, "they depend on the image"
    torch.testing.assert_close(features, expected, rtol=1e-2, atol=1e-2)

    coloured = load(weights, (3, 28, 28))
    torch.testing.assert_close(coloured(images.expand(-1, 3, -1, -1))[0], features)
    assert coloured.fingerprint == extractor.fingerprint
    save_file(small.state_dict(), tmp_path / "small.safetensors")
    assert load(tmp_path / "small.safetensors").fingerprint == extractor.fingerprint, "whatever the file"
    state = small.state_dict()
    torch.save(state | {"norm.bias": state["norm.bias"] + 1e-3}, weights)
    assert load(weights).fingerprint != extractor.fingerprint


@pytest.mark.slow
def test_bad_weights_are_refused(small: nn.Module, weights: Path, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    assert timm.models.get_pretrained_cfg("vit_large_patch14_dinov2.lvd142m").url == Dinov2Features.weights.url
    with pytest.raises(UserError, match=r"evaluation\.dinov2_weights is .*none\.pth: no such file"):
        load(tmp_path / "none.pth")
    with pytest.raises(UserError, match="1 or 3 channels, not 4"):
        load(weights, (4, 28, 28))
    state = small.state_dict()
    torch.save({name: tensor for name, tensor in state.items() if name != "norm.bias"}, tmp_path / "lacking.pth")
    torch.save(state | {"weight": Trap(tmp_path / "executed")}, tmp_path / "pickle.pth")
    (tmp_path / "noise.pth").write_bytes(b"noise" * 1000)
    (tmp_path / "short.pth").write_bytes(weights.read_bytes()[:-1000])
    for name in ("lacking", "pickle", "noise", "short"):
        with pytest.raises(UserError, match=rf"{name}\.pth is not DINOv2's .* get https://dl") as refused:
            load(tmp_path / f"{name}.pth")
        assert "\n" not in str(refused.value)
    assert not (tmp_path / "executed").exists()


def test_without_timm_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    (tmp_path / "any.pth").touch()
    with pytest.raises(UserError, match=r"pip install 'gan-pipeline\[dinov2\]'"):
        load(tmp_path / "any.pth")
