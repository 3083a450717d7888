"""The report of real-looking run folders and their comparison: what the pages say, and what they withstand."""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import sys
import tempfile
from base64 import b64decode
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.distributed.launcher import run_program
from pipeline.errors import UserError
from pipeline.report import main
from pipeline.reporting import few_images
from pipeline.reporting.page import MAX_GRIDS, compare, data_uri, write_report
from pipeline.reporting.read import read_run
from tests.reporting.made_runs import Page, decoded, make_run, save_image

HOSTILE = "<img src=x onerror=alert(1)>\"'&amp;{{ 7*7 }}$x$`<script>alert(2)<"


def test_report_says_everything_verdict_first(run: Path) -> None:
    page = Page(write_report(run))
    assert page.texts_of("h1") == ["made"]
    assert page.texts_of("h2") == [
        "FID in mnist features",
        "From the first samples to the last",
        "Scores",
        "Scores over training",
        "Training",
        "A closer look at the samples",
        "Time",
        "All evaluations",
        "Configuration",
        "Provenance",
    ]
    titles = (
        "FID,Inception score,KID,KL of modes,Fidelity and variety,Losses,Wasserstein estimate,Critic on unseen images,"
    )
    titles += "Clipped weights,"
    titles += "Critic gradient norm,Classes of the samples,FID of each class,Nearest training images,Interpolation,"
    titles += "Throughput,Where 18 min went"
    assert page.texts_of("h3") == ["Generated", "Real", *titles.split(",")]
    assert len(page.all("svg")) == 13
    # The verdict: 45.2 / 0.904 = 50; the interval is 45.2 * 2950 / 3000 to 45.2 * 3050 / 3000.
    for words in (
        "finished, 3,000 steps",
        "Launched 2026-11-30 19:02 UTC Seed 0 Weights of the generator 34,184 Weights of the critic 66,056 "
        # 900 s of training and 150 s of evaluation on 2 ranks of 2 threads
        "Hardware 4 x Xeon · 2 ranks Duration 18 min Cost 4,200 core seconds gan-pipeline train --config wgan",
        "45.2 10,000 images · 95% interval for the mean FID of as many images: 44.4 to 46.0 · floor 0.904 · 43.7 with "
        "infinitely many images",
        "That is 50 times the floor of 0.904, which 10,000 real test images score against the same real train images: "
        "a wide gap between generated and real images.",
        "Best FID 45.2 the last",
        "Inception score 9.30 ± 0.060",
        "KID 0.0300 ± 0.0040",
        "Images 10,000 against train",
        # 900 s of training, 150 s of evaluation, 60 waits of 0.5 s: 857 / 1050, 150 / 1050 and 30 / 1050.
        "training and the rest 82.9% evaluation 14.3% waiting for data 2.9%",
        "3f7c2a9",
        "packages · torch 2.15.0",
        "ab" * 32,
        "mnist features · extractor " + "cd" * 32,
        "The first of each row is generated, beside it are the training images nearest to it, among "
        "50,000. Twins would mean that the generator memorised. An image counts as a copy if it "
        "is nearer to its nearest training image than any other training image is to that one; all others are new. "
        "In mnist features 48.1% of 1,000 generated images are new, and 47.9% of 990 real images that were not trained "
        "on. Copies would bring the share of generated ones towards 0.",
        "Precision 0.800 k = 3",
        "Modes 10 KL of modes 0.0721 floor 0.00188",
        "95% interval for the mean KL of modes of as many images. Floor, what real images in the place of the "
        "generated ones have: 0.00188",
        "GAN-test 91.5% show the class asked for",
        "GAN-train 87.6% of real images are told right by a classifier of 10,000 generated images",
        "In the last evaluation it scores unseen images lower than those it trains on, by 15.0% of its distance from "
        "these to generated ones (standard error 2.1%). "
        "N = 2,000 training, 1,995 test, 1,990 generated images.",
        "Distance to the real images: lower is better. Band: 95% interval for the mean FID of as many images. "
        "Floor, what real images in the place of the generated ones have: 0.904 (dashed where it is near). "
        "N = 10,000 generated, 60,000 real.",
        "Confident and varied classes: higher is better. N = 10,000 generated.",
        "unbiased: lower is better. N = 10,000 generated, 50,000 real.",
        "how many real images the samples reach. k = 3. N = 10,000 generated, 10,000 real.",
        "mean confidence 0.930. N = 10,000 generated, 60,000 real.",
        "Marks: the floor, 10,000 other real images of all classes. N = 10,000 generated, 60,000 real.",
        "the package's own MNIST classifier (test accuracy 0.995): the FIDs of papers",
    ):
        assert words in page.text
    assert page.text.index("45.2") < page.text.index("Scores over training")


def test_scores_of_earlier_versions_are_reported(run: Path) -> None:
    """Of the version before, which had neither these scores nor told the k that it took."""
    for path in (run / "evaluation").glob("step-*.json"):
        content = json.loads(path.read_text())
        del content["critic"], content["gan_train"], content["features"]["mnist"]["provenance"]["neighbours"]
        for key in (
            "fid_infinite",
            "sliced_wasserstein",
            "sliced_wasserstein_floor",
            "authenticity",
            "modes",
            "mode_kl",
        ):
            del content["features"]["mnist"][key]
        del content["features"]["mnist"]["authenticity_real"], content["features"]["mnist"]["images"]["authenticity"]
        path.write_text(json.dumps(content))
    page = Page(write_report(run))
    assert "floor 0.904 That is" in page.text
    assert "Precision 0.800 k = 5" in page.text
    for word in ("infinitely", "Critic on unseen", "GAN-train", "counts as a copy", "KL of modes 0"):
        assert word not in page.text
    assert len(page.all("svg")) == 11
    assert "infinitely" not in (run / "report.md").read_text()


def test_the_first_tenth_and_last_samples_are_a_strip(run: Path) -> None:
    page = Page(write_report(run))
    words = "Step 500, 17% Step 1,000, 33% FID 136 Step 1,500, 50% Step 2,000, 67% FID 67.8 Step 2,500, 83% "
    assert words + "Step 3,000, 100% FID 45.2" in page.text
    newest, strip = grids(page)
    assert len(strip) == 6
    with Image.open(run / "samples" / "03000.png") as original:
        assert decoded(newest).tobytes() == decoded(strip[-1]).tobytes() == original.tobytes()


def grids(page: Page) -> tuple[str | None, list[str | None]]:
    """Returns the newest grid and the strip of grids over training, as they are embedded."""
    images = [(image["alt"], image["src"]) for image in page.all("img")]
    strip = [source for text, source in images if str(text).startswith("Grid of generated images at step")]
    return dict(images).get("Grid of generated images"), strip


def test_report_is_self_contained_and_accessible(run: Path) -> None:
    page = Page(write_report(run))
    assert "://" not in page.source
    assert re.findall(r"url\((?!#)|@import", page.source) == []
    for _, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "srcset"):
            assert (attributes.get(name) or "#").startswith(("data:", "#"))
    assert all(image["alt"] for image in page.all("img"))
    assert all(chart["role"] == "img" and chart["aria-label"] for chart in page.all("svg"))
    ids = [attributes["id"] for _, attributes in page.elements if attributes.get("id")]
    # Matplotlib repeats an identical shape under the same id.
    assert all(re.fullmatch(r"[mp][0-9a-f]{10}", i or "") for i in ids)
    used = set(re.findall(r'(?:url\(|href=")#(\w+)', page.source))
    assert used <= set(ids)


def test_report_of_many_large_grids_stays_small(run: Path) -> None:
    for step in (*range(20, 500, 20), 3060):
        save_image(run / "samples" / f"{step:05d}.png", (320, 320), step)
    report = write_report(run)
    assert report.stat().st_size < 3_000_000
    page = Page(report)
    assert len(grids(page)[1]) == MAX_GRIDS
    # 31 grids, 11 shown: every third.
    steps = re.findall(r"Step ([\d,]+), \d+%", page.text)
    assert steps == ["20", "80", "140", "200", "260", "320", "380", "440", "500", "2,000", "3,060"]


def test_same_folder_gives_same_bytes_and_no_other_file(run: Path) -> None:
    before = {path.name for path in run.iterdir()}
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first
    assert {path.name for path in run.iterdir()} - before == {"report.html", "report.md", "report.json"}


@pytest.mark.parametrize(
    ("kept", "headings"),
    [
        ({"config.yaml"}, ["Configuration"]),
        ({"metrics.jsonl"}, ["Training", "Time"]),
        ({"samples"}, ["From the first samples to the last", "A closer look at the samples"]),
        (
            {"config.yaml", "samples"},
            ["From the first samples to the last", "A closer look at the samples", "Configuration"],
        ),
        (
            {"evaluation"},
            [
                "FID in mnist features",
                "Scores",
                "Scores over training",
                "Training",  # of the evaluations: the critic's scores
                "A closer look at the samples",
                "All evaluations",
                "Provenance",
            ],
        ),
    ],
)
def test_any_part_alone_gives_a_report(run: Path, kept: set[str], headings: list[str]) -> None:
    for path in list(run.iterdir()):
        if path.name not in kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = Page(write_report(run))
    assert page.texts_of("h2") == headings
    assert ("Not evaluated yet" in page.text) == ("evaluation" not in kept)
    assert bool(grids(page)[1]) == ("samples" in kept)
    assert json.loads((run / "report.json").read_text())["run"] == "made"


def test_unfinished_run_says_how_far_it_came(run: Path) -> None:
    shutil.rmtree(run / "evaluation")
    for step in (2000, 2500, 3000):
        (run / "samples" / f"{step:05d}.png").unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(lines[:31]))
    page = Page(write_report(run))
    assert "unfinished, step 1,550 of 3,000" in page.text
    assert f"gan-pipeline evaluate {run}" in page.text
    assert "Scores over training" not in page.texts_of("h2")


def test_damaged_files_are_named_and_the_rest_is_shown(run: Path) -> None:
    grid = run / "samples" / "03000.png"
    grid.write_bytes(grid.read_bytes()[:2000])
    (run / "samples" / "03000-interpolation.png").write_bytes(b"not an image")
    (run / "evaluation" / "step-00003000.json").write_text('{"step": 3000, "feat')
    (run / "evaluation" / "step-00002000.json").write_text('["a list"]')
    (run / "config.yaml").write_text("training: {steps: [")
    (run / "environment.json").write_bytes(b"\xff\xfe")
    page = Page(write_report(run))
    damaged = ["03000.png", "03000-interpolation.png", "step-00003000.json", "step-00002000.json"]
    for name in [*damaged, "config.yaml", "environment.json"]:
        assert f"{name} is damaged" in page.text
        assert f"{name} is damaged" in json.loads((run / "report.json").read_text())["notes"]
    assert "FID in mnist features 136 10,000 images" in page.text
    newest, strip = grids(page)
    assert newest == strip[-1]
    assert len(strip) == 5


def test_hostile_names_and_values_stay_text(tmp_path: Path) -> None:
    run = make_run(tmp_path / HOSTILE.replace("/", ""))
    config = {"training": {"objective": HOSTILE, HOSTILE: HOSTILE}, "data": {"dataset": "\x00\x1b[0m"}}
    (run / "config.yaml").write_text(json.dumps(config))
    (run / "environment.json").write_text(json.dumps({HOSTILE: HOSTILE, "lone": "\ud800"}))
    path = run / "evaluation" / "step-00003000.json"
    content = json.loads(path.read_text())
    scores = content["features"].pop("mnist")
    scores |= {"class_histogram": {HOSTILE: 0.5, "汉字": 0.5}, "fid_interval": "ab", "provenance": {HOSTILE: HOSTILE}}
    content |= {"weights": HOSTILE, "reference": HOSTILE, "features": {HOSTILE: scores}}
    path.write_text(json.dumps(content))
    plain_run = make_run(tmp_path / "plain")
    for page in (Page(write_report(run)), Page(compare([run, plain_run], tmp_path / "out.html"))):
        assert page.all("script") == []
        assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
        assert all(str(image["src"]).startswith("data:") for image in page.all("img"))
        assert HOSTILE in page.text
        assert "49" not in page.texts_of("h1")[0]
    outside_code = re.sub("`[^`]*`", "", (run / "report.md").read_text())
    assert "<" not in outside_code
    assert "FID" in outside_code


def test_classes_are_shown_by_their_names(run: Path) -> None:
    """In any script, though the font that measures the labels has not all characters."""
    path = run / "evaluation" / "step-00003000.json"
    content = json.loads(path.read_text())
    content["features"]["mnist"]["class_histogram"] = {"caf\u00e9": 0.5, "\u6c49\u5b57": 0.25, "a\nb": 0.25}
    path.write_text(json.dumps(content))
    environment = json.loads((run / "environment.json").read_text())
    for rows in (None, "tea", ["tea", HOSTILE]):
        assert read_run(run).sample_rows == [], "of a run of before, and of damaged ones"
        (run / "environment.json").write_text(json.dumps(environment | {"sample_rows": rows}))
    page, other = Page(write_report(run)), Page(compare([run], run / "out.html"))
    assert {"caf\u00e9", "\u6c49\u5b57", "a?b"} <= set(page.texts_of("text"))
    for text in (page.text, other.text):
        assert f"Generated rows, from the top: tea, {HOSTILE}." in text
    assert "- rows of the samples, from the top: `tea`, `" in (run / "report.md").read_text()


def test_json_summary_is_for_machines(run: Path) -> None:
    path = run / "evaluation" / "step-00003000.json"
    path.write_text(path.read_text().replace('"is_std": 0.06', '"is_std": NaN'))
    write_report(run)
    summary = json.loads((run / "report.json").read_text(), parse_constant=pytest.fail)
    assert summary["evaluation"]["features"]["mnist"]["fid"] == 45.2
    assert summary["evaluation"]["features"]["mnist"]["is_std"] is None
    assert summary["evaluation"]["step"] == 3000
    assert summary["best"] == {"mnist": {"fid": 45.2, "step": 3000.0}}
    assert summary["timing"] == {
        "total_seconds": pytest.approx(1050),
        "device_seconds": pytest.approx(4200),
        "evaluation_share": pytest.approx(150 / 1050),
        "data_wait_share": pytest.approx(30 / 1050),
        "images_per_second": 425.0,  # alternates between 400 and 450
    }
    assert summary["differences"]["training.n_critic"] == {"value": 2, "default": 5}
    mail = (run / "report.md").read_text()
    assert mail.startswith(
        "# `made`: finished, 3,000 steps\n\n- **FID 45.2** (`mnist` of a classifier with test accuracy 0.995, "
        "step 3,000, 10,000 images; 43.7 with infinitely many). That"
    )
    assert "`training.n_critic=2`" in mail
    assert len(mail.splitlines()) < 10


def test_best_step_is_named_when_it_is_not_the_last(run: Path) -> None:
    path = run / "evaluation" / "step-00002000.json"
    path.write_text(path.read_text().replace('"fid": 67.8', '"fid": 40.5'))
    assert "Best FID 40.5 at step 2,000" in Page(write_report(run)).text


def test_data_uri_is_lossless_where_it_fits_and_never_larger(tmp_path: Path) -> None:
    def embedded(name: str, max_bytes: int) -> tuple[str, bool]:
        image = data_uri(tmp_path / name, max_bytes, [])
        assert image is not None
        return image

    save_image(tmp_path / "noise.png", (700, 500), 0)
    large, few_pixels = embedded("noise.png", 1_000_000)
    assert decoded(large).size == (700, 500)
    assert not few_pixels
    with Image.open(tmp_path / "noise.png") as original:
        assert decoded(large).tobytes() == original.tobytes()
    small, _ = embedded("noise.png", 10_000)
    assert len(b64decode(small.partition(",")[2])) <= 10_000
    assert decoded(small).format == "WEBP"
    Image.new("RGB", (40, 30), (200, 10, 10)).save(tmp_path / "red.png")
    red, few_pixels = embedded("red.png", 10_000)
    assert decoded(red).getpixel((3, 3)) == (200, 10, 10)
    assert few_pixels


def test_compare_sets_runs_side_by_side_the_best_first(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "first", fid=45.2),
        make_run(tmp_path / "second", fid=30.1, n_critic=5),
        make_run(tmp_path / "third", fid=60.0),
    ]
    (runs[2] / "samples" / "03000.png").unlink()
    out = tmp_path / "new" / "out.html"
    assert compare(runs, out) == out
    page = Page(out)
    assert page.texts_of("h2") == ["Scores", "Newest samples", "Scores over training", "Settings that differ"]
    assert "Settings that differ Setting A B C training. n_critic 5 2" in page.text
    costs = "3,000 425 18 min 4,200 core s finished, 3,000 steps"
    assert f"A second 30.1 9.30 0.0300 0.800 0.600 10 0.0721 {costs} B first 45.2" in page.text
    assert marked_best(page) == ["A second"]
    fid_chart = re.findall(r"<svg.*?</svg>", page.source, flags=re.DOTALL)[0]
    assert [letter for letter in "ABC" if f">{letter}</text>" in fid_chart] == ["A", "B", "C"]
    assert {f"var(--line-{i})" for i in range(3)} <= set(re.findall(r"var\(--line-\d\)", fid_chart))
    assert len(page.all("img")) == 3
    assert "Step 2,500" in page.text
    assert "://" not in page.source


def marked_best(page: Page) -> list[str]:
    return re.findall(r'<tr class="marked"><th scope="row">([^<]*)<', page.source)


def test_a_best_is_named_among_scores_that_compare_alone(tmp_path: Path) -> None:
    first, second, third = make_run(tmp_path / "first"), make_run(tmp_path / "second", 50.0), tmp_path / "third"
    fashion = make_run(tmp_path / "fashion", 3.0, dataset="ef" * 32)
    few = make_run(tmp_path / "few", 2.0, num_images=5000)
    page = Page(compare([fashion, first, second, few], tmp_path / "out.html"))
    assert marked_best(page) == ["A first"]
    assert "Scores in mnist features; the best of those scored like A comes first." in page.text
    assert "D fashion does not compare with A: dataset is efefefef, not abababab." in page.text
    assert "C few does not compare with A: num_images is 5,000, not 10,000." in page.text
    fid_chart = re.findall(r"<svg.*?</svg>", page.source, flags=re.DOTALL)[0]
    assert [letter for letter in "ABCD" if f">{letter}</text>" in fid_chart] == ["A", "B"]
    assert set(re.findall(r"var\(--line-\d\)", fid_chart)) == {"var(--line-0)", "var(--line-1)"}
    assert '<span class="key key-0">A first</span> <span class="key key-1">B second</span>' in page.source
    for other in (fashion, few):
        assert marked_best(Page(compare([first, other], tmp_path / "out.html"))) == []
    path = make_run(third, 1.0) / "evaluation" / "step-00003000.json"
    path.write_text(path.read_text().replace("cd" * 32, "01" * 32))
    page = Page(compare([first, second, third], tmp_path / "out.html"))
    assert marked_best(page) == ["A first"]
    assert "C third does not compare with A: extractor is 01010101, not cdcdcdcd." in page.text
    fewer = make_run(tmp_path / "fewer", 2.5, num_images=5000)
    page = Page(compare([first, second, few, fewer, make_run(tmp_path / "alike")], tmp_path / "out.html"))
    assert page.text.count("compare with A") == 1
    assert "D few, E fewer do not compare with A: num_images is 5,000, not 10,000." in page.text


def test_runs_without_scores_are_compared_in_the_rest(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "first"), make_run(tmp_path / "third")]
    shutil.rmtree(runs[1] / "evaluation")
    page = Page(compare(runs, tmp_path / "out.html"))
    assert "not compare" not in page.text
    assert re.search(r"B third — — — — .* finished, 3,000 steps; not evaluated", page.text)
    assert marked_best(page) == []
    (runs[1] / "metrics.jsonl").unlink()
    path = next((make_run(tmp_path / "other") / "evaluation").glob("step-*3000.json"))
    path.write_text(path.read_text().replace('"mnist"', '"own"'))
    for old in path.parent.glob("step-*[12]000.json"):
        old.unlink()
    page = Page(compare([*runs, make_run(tmp_path / "second"), path.parents[1]], tmp_path / "out.html"))
    assert "finished, 3,000 steps; not evaluated; no log, so no times" in page.text
    assert "finished, 3,000 steps; not evaluated in mnist features" in page.text
    assert "None of them is evaluated yet" in Page(compare(runs[1:], tmp_path / "out.html")).text


def test_curves_and_the_best_are_of_scores_that_compare_with_the_last(run: Path) -> None:
    path = run / "evaluation" / "step-00002000.json"
    path.write_text(
        path.read_text().replace('"fid": 67.8', '"fid": 0.5').replace('"num_images": 10000', '"num_images": 9')
    )
    found = read_run(run)
    assert found.scored("mnist", "fid").steps == [1000, 3000]
    assert found.best == {"mnist": {"fid": 45.2, "step": 3000}}
    assert "2,000 mnist 9 0.500 0.904" in Page(write_report(run)).text


def test_few_images_are_warned_of(tmp_path: Path) -> None:
    warning = "only 1,999 images are scored"
    run = make_run(tmp_path / "few", num_images=1999)
    assert f"Warning: {warning}" in Page(write_report(run)).text
    assert warning in (run / "report.md").read_text()
    assert warning in json.loads((run / "report.json").read_text())["warning"]
    enough = make_run(tmp_path / "enough", num_images=2000)
    assert "Warning" not in Page(write_report(enough)).text
    assert json.loads((enough / "report.json").read_text())["warning"] is None
    path = enough / "evaluation/step-00003000.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"warning": few_images(2000, 1999)}))
    assert "Warning: only 1,999 real images: more would give lower FIDs" in Page(write_report(enough)).text
    assert "- warning: `only 1,999 real images" in (enough / "report.md").read_text()


@pytest.mark.parametrize(("overfitting", "words"), [(-0.265, "scores unseen images higher"), (0.04, None)])
def test_a_critic_is_said_to_know_images_by_heart_only_beyond_its_error(
    overfitting: float, words: str | None, run: Path
) -> None:
    path = run / "evaluation/step-00003000.json"
    content = json.loads(path.read_text())
    content["critic"]["overfitting"] = overfitting
    path.write_text(json.dumps(content))
    page = Page(write_report(run))
    assert ("scores unseen images" in page.text) == (words is not None)
    assert words is None or f"{words} than those it trains on, by 26.5% of its distance" in page.text


def test_a_page_without_floors_says_why_and_has_published_scores(run: Path) -> None:
    for path in (run / "evaluation").glob("step-*.json"):
        content = json.loads(path.read_text())
        scores = content["features"]["mnist"]
        scores |= {"fid_floor": None, "mode_kl_floor": None, "modes": 1.0, "fid_published": 51.5}
        scores["images"]["fid_floor"] = None
        path.write_text(json.dumps(content))
    page = Page(write_report(run))
    assert (
        "44.4 to 46.0 · 43.7 with infinitely many images No floor, because the real images have no test split:"
        in page.text
    )
    assert "KL of modes 0.0721 no floor, because the real images have no test split" in page.text
    assert "FID, published 51.5 statistics of a file" in page.text
    assert "Step Features Images FID FID, published FID, N → ∞ IS" in page.text
    assert "floor —" not in page.text
    assert "- 1 mode, KL from uniform 0.0721 (no floor, because" in (run / "report.md").read_text()
    assert read_run(run).in_brief == [
        "mnist FID 45.2 (no floor, because the real images have no test split) at step 3000"
    ]


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.write_text("file")])
def test_what_is_no_run_is_refused_in_one_line(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str], make: Callable[[Path], object]
) -> None:
    wrong, out = tmp_path / "wrong", tmp_path / "out.html"
    make(wrong)
    for arguments in ([str(wrong)], [str(run), str(wrong), "--out", str(out)]):
        with pytest.raises(SystemExit) as ended:
            run_program(functools.partial(main, arguments))
        assert ended.value.code == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith(f"error: {wrong} is not a ")
        assert captured.err.count("\n") == 1
    assert not out.exists()
    assert not (run / "report.html").exists()
    assert not wrong.is_dir() or not any(wrong.iterdir())


def test_page_that_cannot_be_written_is_an_error_of_one_line(tmp_path: Path, run: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file/out\.html: "):
        compare([run], tmp_path / "file" / "out.html")
    (run / "report.html").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*report\.html: Is a directory"):
        write_report(run)
    assert [path for path in run.iterdir() if path.name.endswith(".tmp")] == []


@pytest.mark.slow
def test_script_runs_without_torch(run: Path, tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "pipeline" / "report.py"
    done = subprocess.run([sys.executable, script, run], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout == f"{run / 'report.html'}\n"
    make_run(tmp_path / "other")
    subprocess.run([sys.executable, script, f"{tmp_path}/*"], capture_output=True, cwd=tmp_path, check=True)
    assert "2 runs side by side" in Page(tmp_path / "comparison.html").text
    for module, heavy in (("pipeline.report", "torch"), ("pipeline.reporting.read", "matplotlib")):
        code = f"import sys, {module}; sys.exit('{heavy}' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_scores_that_cannot_be_drawn_are_left_out(run: Path) -> None:
    path = run / "evaluation" / "step-00003000.json"
    content = json.loads(path.read_text())
    content["features"]["mnist"] |= {"fid_interval": [1, 10**400], "class_histogram_real": {"0": "much", "1": 10**400}}
    path.write_text(json.dumps(content))
    page = Page(write_report(run))
    assert len(page.all("svg")) == 13


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
KEYS = st.sampled_from(
    ["step", "num_images", "features", "mnist", "fid", "fid_floor", "fid_interval", "class_histogram"]
)
RECORDS = st.dictionaries(KEYS, VALUES | st.dictionaries(KEYS, VALUES | st.dictionaries(KEYS, VALUES)))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text() | RECORDS.map(json.dumps), max_size=4), RECORDS | VALUES, RECORDS | VALUES)
@example([], {}, {"fid": 1e-100})
@example([], {"step": 10**400, "features": {"mnist": {"fid": 1.0}}}, {})
def test_no_content_of_the_files_breaks_the_report(log: list[str], scores: object, environment: object) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        (run / "evaluation").mkdir()
        (run / "metrics.jsonl").write_text("\n".join(log), encoding="utf-8", errors="replace")
        evaluation = {"step": 5, "num_images": scores, "features": {"mnist": scores, "inception": environment}}
        (run / "evaluation" / "step-00000005.json").write_text(json.dumps(evaluation))
        (run / "evaluation" / "step-00000006.json").write_text(json.dumps(scores))
        (run / "evaluation" / "best.json").write_text(json.dumps(evaluation | {"chosen_by": environment}))
        (run / "environment.json").write_text(json.dumps(environment))
        (run / "config.yaml").write_text(json.dumps({"training": scores, "run": environment}))
        Page(write_report(run))
        Page(compare([run, run], run / "out.html"))
