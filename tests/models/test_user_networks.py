"""Networks of the user's own: drawn by seeds, left as they are, the right way round, and never imported by a file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import nn

from pipeline.config import Config, NetworkConfig, make_parser, parse, to_yaml
from pipeline.distributed.batch_norm import CONVERTED
from pipeline.errors import UserError
from pipeline.export.__main__ import NetworkCode, convert
from pipeline.export.generator_file import fingerprint, load_generator, save_export, save_onnx
from pipeline.export.images import render, render_range
from pipeline.models.networks import Critic, Generator, build_critic, build_generator
from pipeline.models.user_networks import BATCH_NORMS, check_user_networks
from pipeline.rng import evaluation_labels, evaluation_latents, seeded
from pipeline.training.state import TrainingState, build_state
from tests.jobs import changed, tiny_config

SHAPE = (1, 8, 8)
GUIDE = NetworkConfig(6, generator="tests.guide:Generator", critic="tests.guide:Critic", options={"hidden": 9})
ODD = NetworkConfig(6, generator="tests.odd_networks:Upright", critic="tests.odd_networks:FirstRow")


def state_of(seed: int = 0, **network: Any) -> TrainingState:
    config = tiny_config(network=network, training={"seed": seed})
    return build_state(config, SHAPE, 0, torch.device("cpu"), torch.amp.GradScaler(enabled=False))


@pytest.mark.parametrize("seed", [0, 1])
def test_weights_are_torchs_own_draws_under_the_runs_seed(seed: int) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, two, other = (
        state_of(each, generator=GUIDE.generator, critic=GUIDE.critic, options={"hidden": 9}).tensors()
        for each in (seed, seed, seed + 2)
    )
    assert torch.equal(torch.get_rng_state(), before), "nobody else's draws are touched"
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    weights = [name for name in one if name.endswith("weight") and "layers.1." not in name]
    assert len(weights) == 2 + 2 + 2
    assert not any(torch.equal(one[name], other[name]) for name in weights)
    assert all(torch.equal(one[name], one[name.replace("generator", "ema")]) for name in one if name.startswith("gen"))
    torch.manual_seed(seeded(seed, "generator weights").initial_seed())
    assert torch.equal(one["generator.network.layers.0.weight"], nn.Linear(8, 9).weight)


def test_the_layers_of_users_are_left_alone() -> None:
    """The reference's transposed convolutions of these strides get a form of their own on a CPU, for kernels of 5."""
    generator = state_of(generator=ODD.generator).generator
    assert not any("forward" in vars(layer) for layer in generator.modules())
    state = state_of(critic=ODD.critic)
    assert isinstance(state.generator, Generator)
    assert any("forward" in vars(layer) for layer in state.generator.modules())
    assert isinstance(state_of(generator=ODD.generator).critic, Critic)


def test_users_see_images_the_right_way_round() -> None:
    generator, critic = build_generator(ODD, SHAPE), build_critic(ODD, SHAPE)
    latents = torch.rand(3, 6)
    with torch.no_grad():
        images = generator(latents)
        rendered = render(generator.eval(), latents)
        scores, logits = critic(images)
    assert not rendered[:, :, -1].any()
    assert (rendered[:, :, 0] > 0).all()
    torch.testing.assert_close(scores, rendered[:, :, 0].float().mean((1, 2)) / 255, rtol=0, atol=1 / 255)
    assert logits is None


def test_a_gain_without_dimensions_resumes() -> None:
    """A moment of the optimiser like any other, beside its count of steps."""
    state = state_of(generator=ODD.generator, critic=ODD.critic)
    for network, optimizer in (
        (state.generator, state.generator_optimizer),
        (state.critic, state.critic_optimizer),
    ):
        for parameter in network.parameters():
            parameter.grad = torch.full_like(parameter, 0.5)
        optimizer.step()
    fresh = state_of(seed=3, generator=ODD.generator, critic=ODD.critic)
    saved = {name: tensor.clone() for name, tensor in state.tensors().items()}
    fresh.load(saved, 1)
    assert fresh.tensors().keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in fresh.tensors().items())
    assert saved["generator_optimizer.network.gain.square_avg"] == pytest.approx(0.1 * 0.25)


def test_a_parameter_of_two_names_is_exported(tmp_path: Path) -> None:
    generator, path = build_generator(ODD, SHAPE, 0, seeded(1, "weights")).eval(), tmp_path / "generator.safetensors"
    save_export(generator, path, {})
    assert torch.equal(
        render_range(load_generator(path, code=ODD.generator), 0, 0, 5), render_range(generator, 0, 0, 5)
    )


@pytest.mark.slow
@pytest.mark.parametrize("num_classes", [0, 3])
def test_exports_and_onnx_give_the_same_images(num_classes: int, tmp_path: Path) -> None:
    generator = build_generator(GUIDE, (3, 16, 12), num_classes, seeded(1, "weights"))
    for name, buffer in generator.named_buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 2, generator=seeded(2, name))
    generator.eval().requires_grad_(False)
    path, onnx = tmp_path / "generator.safetensors", tmp_path / "generator.onnx"
    save_export(generator, path, {})
    loaded = load_generator(path, code=GUIDE.generator)
    expected = render_range(generator, 0, 0, 5)
    assert torch.equal(render_range(loaded, 0, 0, 5), expected)
    assert fingerprint(loaded) == fingerprint(generator)
    with pytest.raises(UserError, match=r"if you trust that code, name it with --network.generator tests.guide:Gen"):
        convert(path, onnx)
    assert convert(path, onnx, network=NetworkCode(GUIDE.generator)) == 0
    feed = {"latents": evaluation_latents(0, 0, 5, 6).numpy()}
    if num_classes:
        feed["labels"] = evaluation_labels(0, 5, [1] * num_classes).numpy()
    (images,) = onnxruntime.InferenceSession(onnx).run(None, feed)
    assert (torch.from_numpy(images * 255) - expected).abs().max() < 0.51
    with pytest.raises(UserError, match=r"out.h5: the Keras notebooks have no network like this; write .safetensors"):
        convert(path, tmp_path / "out.h5", network=NetworkCode(GUIDE.generator))
    deep = build_generator(NetworkConfig(6, 0.05), (3, 64, 64), 0, seeded(1, "weights")).eval()
    save_export(deep, tmp_path / "deep.safetensors", {})
    with pytest.raises(UserError, match=r"deep.h5: the Keras notebooks have no network like this"):
        convert(tmp_path / "deep.safetensors", tmp_path / "deep.h5")
    assert list(tmp_path.glob("*.h5")) == []
    save_onnx(deep, tmp_path / "deep.onnx")
    (images,) = onnxruntime.InferenceSession(tmp_path / "deep.onnx").run(
        None, {"latents": evaluation_latents(0, 0, 5, 6).numpy()}
    )
    assert (torch.from_numpy(images * 255) - render_range(deep, 0, 0, 5)).abs().max() < 0.51


def test_a_file_makes_nobody_import_what_it_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only who reads it does, under the name that he gives."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    name = f"trap_of_{tmp_path.name}"
    source = (
        f"from pathlib import Path\nPath({str(tmp_path / 'imported')!r}).touch()\nfrom tests.guide import Generator\n"
    )
    (tmp_path / f"{name}.py").write_text(source)
    generator, path = build_generator(GUIDE, SHAPE), tmp_path / "generator.safetensors"
    generator.config = NetworkConfig(6, generator=f"{name}:Generator", options={"hidden": 9})
    save_export(generator, path, {})
    with pytest.raises(UserError, match=f"holds a network of its user's own, {name}:Generator"):
        load_generator(path)
    assert render_range(load_generator(path, code=GUIDE.generator), 0, 0, 2).shape == (2, *SHAPE)
    assert not (tmp_path / "imported").exists()
    load_generator(path, code=f"{name}:Generator")
    assert (tmp_path / "imported").exists()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"training": {"objective": "wgan_gp", "gradient_penalty": 10.0, "clip_value": None}},
            "network.critic has batch norm: gradient penalties and runtime.accumulation need",
        ),
        ({"training": {"r1_penalty": 10.0}}, "network.critic has batch norm"),
        ({"training": {"r2_penalty": 10.0}}, "network.critic has batch norm"),
        ({"runtime": {"accumulation": 2}}, "network.critic has batch norm"),
    ],
)
def test_a_critic_whose_scores_depend_on_each_other_is_refused_where_that_matters(
    sections: dict[str, dict[str, Any]], message: str
) -> None:
    sound = changed(Config(), network={"critic": "tests.odd_networks:Judge"})
    check_user_networks(sound, SHAPE, 0)
    with pytest.raises(UserError, match=message):
        check_user_networks(changed(sound, **sections), SHAPE, 0)
    check_user_networks(changed(sound, network={"critic": "tests.odd_networks:FirstRow"}, **sections), SHAPE, 0)


def test_a_generator_of_ones_own_is_not_taken_in_parts() -> None:
    sound = changed(Config(), network={"generator": "tests.odd_networks:Sound"})
    check_user_networks(sound, SHAPE, 0)
    with pytest.raises(UserError, match=r"runtime.accumulation is 2: network.generator, a network of your own, can't"):
        check_user_networks(changed(sound, runtime={"accumulation": 2}), SHAPE, 0)


def test_options_come_from_files_and_arguments_and_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "network:\n  generator: a:B\n  options:\n    hidden: 3\n    layers: [{kind: dense}, 1.0e-05, null]\n"
    )
    expected = {"hidden": 3, "layers": [{"kind": "dense"}, 1e-5, None]}
    config = parse(make_parser("test"), ["--config", str(path)])[0]
    assert config.network.options == expected
    path.write_text(to_yaml(config))
    assert parse(make_parser("test"), ["--config", str(path)])[0] == config
    given = ["--network.generator=a:B", "--network.options={hidden: 4}"]
    assert parse(make_parser("test"), given)[0].network.options == {"hidden": 4}


@pytest.mark.parametrize("value", [float("nan"), {1: 2}, (1, 2), object()])
def test_options_that_no_file_keeps_are_refused(value: object) -> None:
    with pytest.raises(UserError, match=r"network.options is .*: files keep"):
        Config(network=NetworkConfig(generator="a:B", options={"key": value}))


def test_options_that_no_network_takes_are_refused() -> None:
    with pytest.raises(UserError, match=r"network.options are for networks of your own: name one, or leave them out"):
        Config(network=NetworkConfig(options={"hidden": 3}))


def test_the_batch_norms_that_users_may_have_are_those_that_are_replaced_over_ranks() -> None:
    assert BATCH_NORMS == CONVERTED
