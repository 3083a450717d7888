"""Where scores go, and that a file of scores is only ever added to by those of the same images, measured alike."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pipeline import configure, evaluate
from pipeline.benchmarking.fidelity import fidelity_scores
from pipeline.config import EvaluationConfig, NetworkConfig, RuntimeConfig
from pipeline.data import Dataset
from pipeline.data.dataset import Remarks
from pipeline.data.images import open_images
from pipeline.data.prepare import prepare_folder, prepare_npz
from pipeline.data.resident import load_split
from pipeline.distributed.process import Runtime
from pipeline.errors import UserError
from pipeline.evaluate import main
from pipeline.evaluation.extract import ImageSet
from pipeline.evaluation.scorer import Scorer
from pipeline.evaluation.targets import score_target
from pipeline.export.generator_file import HUB_WEIGHTS, save_export
from pipeline.export.images import render, render_range
from pipeline.models.networks import Generator
from pipeline.rng import evaluation_latents
from pipeline.storage.run_folder import RunFolder
from tests.export.generators import damage, random_generator, saved_run
from tests.jobs import restoring_process

NUM_IMAGES = 120


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    with restoring_process():
        yield Runtime(RuntimeConfig(device="cpu", threads=1))


@pytest.fixture
def scorer(digits: Dataset, runtime: Runtime) -> Scorer:
    return Scorer(EvaluationConfig(num_images=NUM_IMAGES), digits, runtime, 0)


@pytest.fixture
def other_digits(digits_files: dict[str, Path], digits: Dataset, runtime: Runtime, tmp_path: Path) -> Scorer:
    """Of another dataset that has the same name, shape, classes and counts."""
    images, labels = load_split(digits, "test")
    np.savez(tmp_path / "test.npz", images=images.flip(0).numpy(), labels=labels.flip(0).numpy())
    dataset = prepare_npz(tmp_path / "other", "digits", digits_files | {"test": tmp_path / "test.npz"}, kind="mnist")
    return Scorer(EvaluationConfig(num_images=NUM_IMAGES), dataset, runtime, 0)


@pytest.fixture
def run(digits: Dataset, tmp_path: Path) -> RunFolder:
    return saved_run(RunFolder(tmp_path / "runs" / "run"), random_generator(), digits.fingerprint, 10, 20)


def score(
    target: Path, scorer: Scorer, root: Path, steps: Sequence[int | None] | None = None, out: Path | None = None
) -> None:
    score_target(target, scorer, steps or [None], out, root / "runs")


def content(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def with_other_extractor(scorer: Scorer) -> Scorer:
    other = copy.copy(scorer)
    other.extractors = [copy.copy(scorer.extractors[0])]
    other.extractors[0].fingerprint = "0" * 64
    return other


def test_a_run_is_scored_on_its_own_dataset_or_into_another_file(
    run: RunFolder, scorer: Scorer, other_digits: Scorer, tmp_path: Path
) -> None:
    score(run.path, scorer, tmp_path)
    before = files(run.path)
    for steps in ([20], [10]):  # scored, and not yet
        with pytest.raises(UserError, match=r"runs/run: was not trained on this dataset \(.*other/digits\).*--out"):
            score(run.path, other_digits, tmp_path, steps)
    assert files(run.path) == before
    score(run.path, other_digits, tmp_path, [20], tmp_path / "there.json")
    ours, theirs = content(run.scores(20)), content(tmp_path / "there.json")
    assert ours["dataset_fingerprint"] == scorer.dataset.fingerprint
    assert theirs["dataset_fingerprint"] == other_digits.dataset.fingerprint
    assert ours["images_fingerprint"] == theirs["images_fingerprint"]
    assert files(run.path) == before
    with pytest.raises(UserError, match=r"steps is \[10, 20\]: with `out` or `real` it must be one step"):
        evaluate(run.path, steps=[10, 20], out=tmp_path / "two.json")
    assert score_target(run.path, scorer, [], None, tmp_path) == []


def test_the_test_split_of_another_dataset_is_another_file_or_refused(
    scorer: Scorer, other_digits: Scorer, tmp_path: Path
) -> None:
    score(Path("test"), scorer, tmp_path)
    out = tmp_path / "runs/evaluations/digits-test.json"
    before = out.read_bytes()
    with pytest.raises(
        UserError, match=r"digits-test\.json: holds other scores \(.*dataset_fingerprint is .{12}\.\.\. there"
    ):
        score(Path("test"), other_digits, tmp_path)
    assert out.read_bytes() == before
    score(Path("test"), scorer, tmp_path)
    assert content(out) == json.loads(before)


@pytest.mark.parametrize("kind", ["folder", "npz"])
def test_a_refilled_folder_of_the_same_name_and_count_is_refused(
    kind: str, digits: Dataset, scorer: Scorer, tmp_path: Path
) -> None:
    images = load_split(digits, "train")[0][: 2 * NUM_IMAGES, 0].numpy()
    target = tmp_path / "mine" / ("pictures.npz" if kind == "npz" else "pictures")
    target.parent.mkdir()

    def fill(part: np.typing.NDArray[np.uint8]) -> None:
        if kind == "npz":
            np.savez(target, images=part)
            return
        target.mkdir(exist_ok=True)
        for number, image in enumerate(part):
            Image.fromarray(image).save(target / f"{number:04d}.png")

    fill(images[:NUM_IMAGES])
    theirs = files(target.parent)
    score(target, scorer, tmp_path)
    assert files(target.parent) == theirs
    out = tmp_path / "runs/evaluations" / f"{target.name}.json"
    before = out.read_bytes()
    fill(images[NUM_IMAGES:])
    with pytest.raises(
        UserError, match=r"holds other scores \(images_fingerprint is .{12}\.\.\. there and .{12}\.\.\. here\)"
    ):
        score(target, scorer, tmp_path)
    fill(images[:NUM_IMAGES])
    score(target, scorer, tmp_path)
    assert content(out) == json.loads(before)
    if kind == "folder":
        (tmp_path / "theirs").mkdir()
        (other := tmp_path / "theirs/pictures").symlink_to(target)
        with pytest.raises(UserError, match=rf"pictures\.json: holds other scores, of {target}, \(size is"):
            score_target(other, scorer, [None], out, tmp_path / "runs", size=28)
        shutil.move(target, tmp_path / "moved")
        score(tmp_path / "moved", scorer, tmp_path, out=out)
        assert content(out) == json.loads(before) | {"target": str(tmp_path / "moved")}


def test_pictures_of_another_size_and_colour_are_scored_as_the_dataset_is(
    digits: Dataset,
    scorer: Scorer,
    run: RunFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Digits within a frame of two pixels, a third of them as RGB, are with --crop 28 the digits themselves."""
    framed = tmp_path / "framed"
    framed.mkdir()
    images = load_split(digits, "train")[0][:NUM_IMAGES, 0].numpy()
    np.savez(tmp_path / "plain.npz", images=images)
    for number, image in enumerate(images):
        picture = Image.fromarray(np.pad(image, 2, constant_values=99))
        picture.convert("L" if number % 3 else "RGB").save(framed / f"{number:03d}.png")
    score(tmp_path / "plain.npz", scorer, tmp_path)
    with pytest.raises(UserError, match="images of 1 x 32 x 32, the dataset digits has 1 x 28 x 28: give --size 28"):
        score(framed, scorer, tmp_path)
    for target in (run.path, run.path / "generator.h5", Path("test")):
        with pytest.raises(UserError, match=f"{target}: --crop and --size are for images in"):
            score_target(target, scorer, [None], None, tmp_path / "runs", crop=28)

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)  # of 1,024; above 1,000 Pillow refuses
    out = tmp_path / "framed.json"
    command = f"evaluate.py {framed} --data.dataset {digits.folder} --crop 28 --out {out} --runtime.device cpu"
    monkeypatch.setattr("sys.argv", command.split())
    with pytest.raises(UserError, match=r"framed/000\.png: Image size \(1024 pixels\).*give --max_pixels"):
        main()
    monkeypatch.setattr("sys.argv", [*command.split(), "--max_pixels", "1024"])
    capfd.readouterr()
    main()
    assert f"{framed}: read as grey: 40 colour images (first: {framed}/000.png)" in capfd.readouterr().err
    plain, cropped = (
        content(path)["features"]["mnist"] for path in (tmp_path / "runs/evaluations/plain.npz.json", out)
    )
    assert cropped["fid"] == pytest.approx(plain["fid"], rel=1e-6)
    with pytest.raises(UserError, match=r"holds other scores \(size is not given there and 28 here; images_"):
        score_target(framed, scorer, [None], out, tmp_path, size=28)
    np.savez(tmp_path / "framed.npz", images=np.pad(images, ((0, 0), (2, 2), (2, 2))))
    read = open_images(tmp_path / "framed.npz", digits, Remarks(), crop=28).read(np.arange(NUM_IMAGES))
    assert np.array_equal(read[:, 0], images)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (lambda scorer: setattr(scorer, "seed", 1), "seed is 0 there and 1 here"),
        (
            lambda scorer: setattr(scorer, "config", EvaluationConfig(num_images=NUM_IMAGES, reference="test")),
            "reference is train there and test here",
        ),
        (
            lambda scorer: setattr(scorer, "config", EvaluationConfig(num_images=NUM_IMAGES, weights="raw")),
            "weights is ema there and raw here",
        ),
        (
            lambda scorer: setattr(scorer, "config", EvaluationConfig(num_images=NUM_IMAGES, neighbours=3)),
            "evaluation.neighbours is 5 there and 3 here",
        ),
        (
            lambda scorer: setattr(scorer, "extractors", with_other_extractor(scorer).extractors),
            r"mnist is .{12}\.\.\. there and 000000000000\.\.\. here",
        ),
    ],
    ids=["seed", "reference", "weights", "neighbours", "extractor"],
)
def test_scores_measured_in_another_way_are_refused_and_the_difference_named(
    change: Callable[[Scorer], None], difference: str, run: RunFolder, scorer: Scorer, tmp_path: Path
) -> None:
    score(run.path, scorer, tmp_path)
    before, changed = files(run.path), copy.copy(scorer)
    change(changed)
    with pytest.raises(
        UserError, match=rf"step-00000020\.json: holds other scores \({difference}\): name another file"
    ):
        score(run.path, changed, tmp_path)
    assert files(run.path) == before


def test_scores_of_another_number_of_images_go_beside_the_first(
    run: RunFolder, scorer: Scorer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    score(run.path, scorer, tmp_path)
    first, more = run.scores(20), copy.copy(scorer)
    before, more.config = first.read_bytes(), EvaluationConfig(num_images=130)
    score(run.path, more, tmp_path)
    other = run.evaluation / "130-images" / first.name
    assert f"{first} has the scores of 120 images: those of 130 go to {other}" in capfd.readouterr().err
    assert content(other)["num_images"] == 130
    assert (first.read_bytes(), run.all_scores()) == (before, [first])
    with pytest.raises(UserError, match="num_images is 120 there and 130 here"):
        score(run.path, more, tmp_path, out=first)


def test_scores_that_do_not_tell_their_neighbours_are_of_five(run: RunFolder, scorer: Scorer, tmp_path: Path) -> None:
    """As files of the version before."""
    score(run.path, scorer, tmp_path)
    after = content(run.scores(20))
    before = copy.deepcopy(after)
    del before["features"]["mnist"]["provenance"]["neighbours"], before["features"]["mnist"]["authenticity"]
    run.scores(20).write_text(json.dumps(before))
    score(run.path, scorer, tmp_path)
    assert content(run.scores(20)) == after


def test_a_generator_is_known_by_its_weights_wherever_they_lie(
    run: RunFolder, digits: Dataset, scorer: Scorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score(run.path, scorer, tmp_path, [10, 20])
    save_export(random_generator(), run.export, {})
    score(run.export, scorer, tmp_path)
    out = tmp_path / "runs/evaluations/run-export-generator.safetensors.json"
    hub = tmp_path / "runs/hub"
    save_export(random_generator(), hub / HUB_WEIGHTS, {})  # a folder of the Hugging Face Hub
    [result] = score_target(hub, scorer, [None], None, tmp_path / "runs")
    assert json.loads(json.dumps(result)) == content(tmp_path / "runs/evaluations/hub.json")
    known = {content(path)["images_fingerprint"] for path in (run.scores(10), run.scores(20), out)}
    monkeypatch.setattr("pipeline.export.hub.download", lambda path: hub / HUB_WEIGHTS)
    score(Path("hf://me/digits"), scorer, tmp_path)
    fetched = content(tmp_path / "runs/evaluations/digits.json")
    assert fetched["target"] == "hf://me/digits"
    assert known == {result["images_fingerprint"], fetched["images_fingerprint"]}
    generator = random_generator()
    with torch.no_grad():
        generator.dense.bias[3] += 1e-6
    save_export(generator, run.export, {})
    with pytest.raises(UserError, match="images_fingerprint is"):
        score(run.export, scorer, tmp_path)
    # The run's own scores are of another generator too, once a checkpoint of that step has other weights.
    shutil.rmtree(run.checkpoint(20))
    saved_run(run, generator, digits.fingerprint, 20)
    with pytest.raises(UserError, match="images_fingerprint is"):
        score(run.path, scorer, tmp_path)


def test_a_damaged_newer_checkpoint_is_named_when_it_is_passed_over(
    run: RunFolder, scorer: Scorer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    damage(run.checkpoint(20))
    score(run.path, scorer, tmp_path)
    assert capfd.readouterr().err.count(f"skipped a damaged checkpoint: {run.checkpoint(20)}/") == 1
    assert [content(path)["step"] for path in run.all_scores()] == [10]


def test_a_checkpoint_is_answered_with_its_run(run: RunFolder, scorer: Scorer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"is a checkpoint: give its run, {run.path} --step 10"):
        score(run.checkpoint(10), scorer, tmp_path)
    for steps in (10, "last"):
        with pytest.raises(UserError, match=rf"steps is {steps!r}: give a list of steps, 'newest' or 'all'"):
            evaluate(run.path, steps=steps)  # type: ignore[arg-type]


def test_a_run_without_the_checkpoint_is_told_which_there_are(
    run: RunFolder, digits: Dataset, scorer: Scorer, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"runs/run: holds no checkpoint of step 15: it has 10, 20$"):
        score(run.path, scorer, tmp_path, [15])
    begun = saved_run(RunFolder(tmp_path / "runs/begun"), random_generator(), digits.fingerprint)
    begun.samples.mkdir()
    Image.new("L", (28, 28)).save(begun.grid(5))
    for steps in ([None], [5], None):
        with pytest.raises(UserError, match="runs/begun: holds no checkpoint, one would be in"):
            score_target(begun.path, scorer, steps, None, tmp_path)


def test_few_images_are_warned_of_once_and_in_the_file(
    run: RunFolder, scorer: Scorer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    score(run.path, scorer, tmp_path, [10, 20])
    warning = "only 120 images are scored: below 2,000"
    assert capfd.readouterr().err.count(warning) == 1
    assert all(content(run.scores(step))["warning"].startswith(warning) for step in (10, 20))


def test_real_images_are_drawn_beside_the_scores(run: RunFolder, scorer: Scorer, tmp_path: Path) -> None:
    score(run.path, scorer, tmp_path)
    picture = run.real_images()
    assert picture is not None
    with Image.open(picture) as grid:
        assert grid.size == (4 * 60 + 4, 4 * 60 + 4)
        first = np.asarray(grid)[4 : 4 + 56 : 2, 4 : 4 + 56 : 2, 0]
    training = load_split(scorer.dataset, "train")[0][:, 0].numpy()
    assert (training == first).all((1, 2)).any()


class Shades(Generator):
    """Images whose brightness says their class, 0 or 1, but for some noise."""

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        assert labels is not None
        return (0.2 + 0.6 * labels.view(-1, 1, 1, 1) + 0.1 * latents[:, :1, None, None]).expand(-1, 1, 28, 28)


def test_a_generator_is_asked_for_classes_as_often_as_they_occur(runtime: Runtime, tmp_path: Path) -> None:
    """One that has learnt classes of unequal sizes to perfection has hardly any FID."""
    labels = torch.arange(400) % 10 // 9  # nine to one
    shades = Shades(NetworkConfig(), (1, 28, 28), 2)
    images = render(shades, evaluation_latents(1, 0, 400, 100), labels)
    np.savez(tmp_path / "shades.npz", images=images.numpy()[:, 0], labels=labels.numpy())
    dataset = prepare_npz(tmp_path, "shades", {"train": tmp_path / "shades.npz"})
    scorer = Scorer(EvaluationConfig(num_images=300, features=["torch.nn:Flatten"]), dataset, runtime, 0)
    scores = scorer.score_generator(shades, tmp_path / "scores.json", {})
    in_turn = ImageSet(300, partial(render_range, shades, 0), torch.arange(300) % 2)
    even = scorer.score(in_turn, tmp_path / "even.json", {"images_fingerprint": ""})
    shades.class_names = ("black", "white")  # and not 0 and 1: classes of something else
    other = scorer.score_generator(shades, tmp_path / "other.json", {})
    fids = [each["features"]["torch.nn:Flatten"]["fid"] for each in (scores, even, other)]
    assert fids[0] < fids[1] / 100
    assert fids[1] == fids[2]
    assert content(tmp_path / "scores.json")["classes"] == "as often as in train"
    before = content(tmp_path / "scores.json")
    del before["classes"]
    (tmp_path / "before.json").write_text(json.dumps(before))
    shades.class_names = ()
    with pytest.raises(UserError, match="classes is all equally often there and as often as in train here"):
        scorer.score_generator(shades, tmp_path / "before.json", {})


def test_a_generator_of_other_images_is_refused(scorer: Scorer, tmp_path: Path) -> None:
    scorer.dataset = replace(scorer.dataset, image_shape=(3, 20, 20))
    with pytest.raises(UserError, match="makes images of 1 x 28 x 28, the dataset digits has 3 x 20 x 20"):
        scorer.score_generator(random_generator(), tmp_path / "scores.json", {})


def test_a_run_of_other_images_is_refused_before_the_features_of_the_dataset_are_missed(
    digits: Dataset, tmp_path: Path
) -> None:
    saved_run(run := RunFolder(tmp_path / "runs/photos"), random_generator(shape=(3, 32, 32)), "ab" * 32, 10)
    settings = {"data.dataset": digits.folder, "evaluation.features": ["own"], "runtime.device": "cpu"}
    with pytest.raises(UserError, match="makes images of 3 x 32 x 32, the dataset digits has 1 x"):
        evaluate(run.path, configure(None, settings))


def test_a_file_that_holds_no_images_is_told_what_can_be_scored(scorer: Scorer, tmp_path: Path) -> None:
    (path := tmp_path / "README.md").write_text("words")
    with pytest.raises(UserError, match=f"{path}: is none of what can be scored; give a run's folder, an exported"):
        score(path, scorer, tmp_path)


def test_published_statistics_are_for_inception(digits: Dataset, runtime: Runtime) -> None:
    with pytest.raises(UserError, match=r"reference_statistics is a.npz, .* \['mnist'\] must name inception"):
        Scorer(EvaluationConfig(reference_statistics="a.npz"), digits, runtime, 0)


def test_two_folders_are_scored_as_one_against_a_dataset_of_the_other(
    digits: Dataset,
    runtime: Runtime,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    images = load_split(digits, "test")[0][: 2 * NUM_IMAGES, 0].numpy()
    for number, image in enumerate(images):
        path = tmp_path / ("ours" if number < NUM_IMAGES else "real") / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(path)
    monkeypatch.chdir(tmp_path)

    def command(*arguments: str) -> None:
        monkeypatch.setattr("sys.argv", ["evaluate.py", "ours", *arguments, "--runtime.device", "cpu"])
        main()

    command("real", "--kind", "mnist")
    err = capsys.readouterr().err
    last, no_floor = err.splitlines()[-1], r"\(no floor, because the real images have no test split\), IS [\d.]+"
    where = f"{tmp_path}/runs/evaluations/ours-real.json: ours against real: mnist FID "
    assert re.fullmatch(rf"{where}[\d.]+ {no_floor}, KID [\d.]+, precision [\d.]+, recall [\d.]+", last), last
    assert ".real-" not in err
    scores = content(tmp_path / "runs" / "evaluations" / "ours-real.json")
    assert (scores["dataset"], scores["target"], scores["num_images"]) == ("real", "ours", NUM_IMAGES)
    files = [sorted((tmp_path / name).iterdir()) for name in ("ours", "real")]
    ours, real = (
        torch.stack([torch.from_numpy(np.array(Image.open(path)))[None] for path in paths]) for paths in files
    )
    theirs = fidelity_scores(
        ours, real, feature_extractor="mnist", batch_size=NUM_IMAGES, cache=False, kid_subset_size=100
    )
    assert scores["features"]["mnist"]["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    prepared = prepare_folder("data", "other", {"train": "real"}, kind="mnist")
    score(tmp_path / "ours", Scorer(EvaluationConfig(num_images=NUM_IMAGES), prepared, runtime, 0), tmp_path)
    expected = content(tmp_path / "runs" / "evaluations" / "ours.json")["features"]["mnist"]
    for name in ("fid", "kid_mean", "precision", "coverage", "is_mean"):
        assert scores["features"]["mnist"][name] == pytest.approx(expected[name], rel=1e-9), name
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"evaluations"}
    for name in ("a", "b"):
        shutil.copytree("real", f"classes/{name}")
    for arguments, words in (
        (("real",), "the 'mnist' features know MNIST's digits alone, and dataset real is of kind own"),
        (("classes",), r"use evaluation\.features \[own\] \(made by gan-pipeline train-classifier --dataset classes\)"),
        (("none", "--kind", "mnist"), "none does not exist"),
        (
            ("real", "--evaluation.features", "[own]"),
            "real is none: gan-pipeline evaluate FOLDER --data.dataset data/NAME scores in them$",
        ),
        (("data", "--kind", "mnist"), "data holds no image file"),
    ):
        with pytest.raises(UserError, match=words):
            command(*arguments)
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"evaluations"}
