"""A run that begins with the weights of another one (`run.start_from`)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from pipeline import train
from pipeline.config import Config, OptimizerConfig
from pipeline.data import Dataset
from pipeline.data.prepare import prepare_npz
from pipeline.errors import UserError
from pipeline.export.generator_file import load_generator, warm_start
from pipeline.models.networks import Critic
from pipeline.models.spectral_norm import use_spectral_norm
from pipeline.storage.run_folder import RunFolder
from tests.export.generators import random_generator, saved_run
from tests.jobs import changed, final_state, tiny_config


def short(digits: Dataset, root: Path, name: str, **run: object) -> Config:
    return tiny_config(
        run={"root": str(root), "name": name, **run},
        data={"dataset": str(digits.folder)},
        training={"steps": 2, "batch_size": 8, "n_critic": 1},
    )


@pytest.fixture(scope="module")
def first(digits_files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    root = tmp_path_factory.mktemp("runs")
    digits = prepare_npz(root, "digits", digits_files, kind="mnist")
    return train(short(digits, root, "first")).folder


def test_a_run_starts_with_all_networks_of_another_and_goes_on_without_it(
    digits: Dataset, first: RunFolder, tmp_path: Path
) -> None:
    source = shutil.copytree(first.path, tmp_path / "source")
    config, still = short(digits, tmp_path, "second", start_from=str(source)), OptimizerConfig(learning_rate=1e-30)
    rates = {"critic_optimizer": still, "generator_optimizer": still}  # so that a step leaves parameters as they are
    run = train(changed(config, training={**rates, "steps": 1})).folder
    before, after = final_state(first.path, 2), final_state(run.path, 1)
    names = [
        name for name in after if name.startswith(("generator.", "critic.")) and name.endswith((".weight", ".bias"))
    ]
    assert len(names) > 20
    assert all(torch.equal(after[name], before[name]) for name in names)
    assert not torch.equal(after["ema.dense.weight"], after["generator.dense.weight"]), "an average of two networks"
    assert yaml.safe_load(run.config.read_text())["run"]["start_from"] == str(source)
    assert json.loads(run.report("json").read_text())["differences"]["run.start_from"]["value"] == str(source)
    shutil.rmtree(source)
    train(changed(config, training={**rates, "steps": 2}))
    assert (tmp_path / "second/checkpoints/step-00000002").exists()
    with pytest.raises(UserError, match=r"run\.start_from is .* there and null here"):
        train(changed(config, training=rates, run={"start_from": None}))


def test_a_generator_alone_starts_generator_and_average(first: RunFolder) -> None:
    exported = load_generator(first.export)
    generator, average = (load_generator(first.export) for _ in range(2))
    critic = Critic(generator.config, (1, 28, 28))
    scores = critic.score.weight.clone()
    for network in (generator, average):
        torch.nn.init.zeros_(network.get_parameter("dense.weight"))
    message = warm_start(str(first.export), generator, average, critic)
    assert message == f"begins with the weights of {first.export}: generator, ema"
    for network in (generator, average):
        assert all(torch.equal(value, exported.state_dict()[name]) for name, value in network.state_dict().items())
    assert torch.equal(critic.score.weight, scores)


def test_what_does_not_fit_is_one_line_and_leaves_nothing(digits: Dataset, first: RunFolder, tmp_path: Path) -> None:
    generator = random_generator(3, (3, 32, 24))
    different = (
        r"network is .*image_shape is \[1, 28, 28\] there and \[3, 32, 24\] here; num_classes is 0 there and 3 here"
    )
    for source, reason in (
        (first.path, rf"its generator does not fit this run's \({different}.*\): give one with the"),
        (first.export, rf"its generator does not fit this run's \({different}"),
    ):
        with pytest.raises(UserError, match=f"run.start_from is {source}: {reason}"):
            warm_start(str(source), generator, generator, Critic(generator.config, (3, 32, 24), 3))
    same = random_generator()
    plain, critic = (Critic(same.config, (1, 28, 28)) for _ in range(2))
    use_spectral_norm(critic, torch.Generator())
    run = saved_run(RunFolder(tmp_path / "plain"), same, "", 5, critic=plain)
    normed = r"its critic does not fit .*\(training.spectral_norm is false there and true here\)"
    with pytest.raises(UserError, match=normed):
        warm_start(str(run.path), random_generator(), random_generator(), critic)
    with pytest.raises(UserError, match=r"nothing\.safetensors: no such file"):
        train(short(digits, tmp_path, "third", start_from=str(tmp_path / "nothing.safetensors")))
    assert not (tmp_path / "third").exists()
