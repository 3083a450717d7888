"""The report of real-looking run folders: what it says, what it withstands, and how a browser shows it."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from base64 import b64decode
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.config import Config, to_yaml
from pipeline.errors import UserError
from pipeline.report import (
    MAX_GRIDS,
    Evaluation,
    Line,
    bar_chart,
    compare,
    data_uri,
    line_chart,
    main,
    number,
    read_run,
    verdict,
    write_report,
)

VOID = {"meta", "link", "img", "input", "wbr", "br"}
HOSTILE = "<img src=x onerror=alert(1)>\"'&amp;{{ 7*7 }}$x$`<script>alert(2)<"


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


def make_run(folder: Path, fid: float = 45.2, n_critic: int = 2, num_images: int = 10_000) -> Path:
    """A finished run of 3,000 steps with every part that a run can have."""
    config = Config()
    run = dataclasses.replace(config.run, name="made")
    training = dataclasses.replace(config.training, steps=3000, n_critic=n_critic, clip_value=0.03)
    (folder / "samples").mkdir(parents=True)
    (folder / "evaluation").mkdir()
    (folder / "config.yaml").write_text(to_yaml(dataclasses.replace(config, run=run, training=training)))
    environment = {"git_commit": "3f7c2a9", "packages": {"torch": "2.15.0"}, "dataset_fingerprint": "ab" * 32}
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
            "fid_interval": [fid * 2950 / step, fid * 3050 / step],
            "is_mean": 9.0 + step / 10_000,
            "is_std": 0.06,
            "kid_mean": 0.03,
            "kid_std": 0.004,
            "precision": 0.8,
            "recall": 0.6,
            "density": 0.75,
            "coverage": None,
            "class_histogram": {str(digit): 0.05 + digit / 90 for digit in range(10)},
            "class_histogram_real": {str(digit): 0.1 for digit in range(10)},
            "class_total_variation": 0.1389,
            "confidence_mean": 0.93,
            "fid_per_class": {str(digit): 60.0 + digit if digit != 4 else None for digit in range(10)},
            "provenance": {"extractor": "cd" * 32},
        }
        content = {"step": step, "num_images": num_images, "reference": "train", "weights": "ema"}
        path = folder / "evaluation" / f"step-{step:08d}.json"
        path.write_text(json.dumps(content | {"features": {"mnist": scores}}))
    for step in range(500, 3001, 500):
        save_image(folder / "samples" / f"{step:05d}.png", (122, 122), step)
    save_image(folder / "samples" / "03000-interpolation.png", (302, 122), 1)
    save_image(folder / "evaluation" / "neighbours-00003000.png", (302, 122), 2)
    return folder


def save_image(path: Path, size: tuple[int, int], seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0]), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def decoded(uri: str | None) -> Image.Image:
    assert uri is not None
    return Image.open(BytesIO(b64decode(uri.partition(",")[2])))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "made")


def test_report_says_everything_verdict_first(run: Path) -> None:
    page = Page(write_report(run))
    assert page.texts_of("h1") == ["made"]
    assert page.texts_of("h2") == [
        "FID in mnist features",
        "Scores over training",
        "Training",
        "A closer look at the samples",
        "Time",
        "All evaluations",
        "Configuration",
        "Provenance",
    ]
    titles = "FID,Inception score,KID,Fidelity and variety,Losses,Wasserstein estimate,Clipped weights,"
    titles += "Critic gradient norm,Classes of the samples,FID of each class,Nearest training images,Interpolation,"
    titles += "Throughput,Where 18 min went"
    assert page.texts_of("h3") == titles.split(",")
    assert len(page.all("svg")) == 11
    # The verdict: 45.2 / 0.904 = 50; the interval is 45.2 * 2950 / 3000 to 45.2 * 3050 / 3000.
    for words in (
        "finished, 3,000 steps",
        "45.2 95% interval 44.4 to 46.0 · floor 0.904",
        "That is 50 times the floor of 0.904, which real test images score against the same real train images: "
        "a wide gap between generated and real images.",
        "Inception score 9.30 ± 0.060",
        "KID 0.0300 ± 0.0040",
        "Images 10,000 against train",
        # 900 s of training, 150 s of evaluation, 60 waits of 0.5 s: 857 / 1050, 150 / 1050 and 30 / 1050.
        "training and the rest 82.9% evaluation 14.3% waiting for data 2.9%",
        "3f7c2a9",
        "packages · torch 2.15.0",
        "ab" * 32,
        "mnist features · extractor " + "cd" * 32,
    ):
        assert words in page.text
    assert page.text.index("45.2") < page.text.index("Scores over training")


def test_grids_show_the_last_step_and_can_be_moved_through(run: Path) -> None:
    frames = [image for image in Page(write_report(run)).all("img") if "data-caption" in image]
    assert [frame["data-caption"] for frame in frames] == [
        "Step 500",
        "Step 1,000 · FID 136 at step 1,000",
        "Step 1,500 · FID 136 at step 1,000",
        "Step 2,000 · FID 67.8 at step 2,000",
        "Step 2,500 · FID 67.8 at step 2,000",
        "Step 3,000 · FID 45.2 at step 3,000",
    ]
    assert ["hidden" in frame for frame in frames] == [True] * 5 + [False]
    with Image.open(run / "samples" / "03000.png") as original:
        assert decoded(frames[-1]["src"]).tobytes() == original.tobytes()


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
    # Matplotlib repeats an identical shape under the same id; everything else is unique.
    assert len({i for i in ids if not re.fullmatch(r"[mp][0-9a-f]{10}", i or "")}) == 1
    used = set(re.findall(r'(?:url\(|href=")#(\w+)', page.source))
    assert used <= set(ids)


def test_report_of_many_large_grids_stays_small(run: Path) -> None:
    for step in range(1, 61):
        save_image(run / "samples" / f"{3000 + step:05d}.png", (320, 320), step)
    report = write_report(run)
    frames = [image for image in Page(report).all("img") if "data-caption" in image]
    assert report.stat().st_size < 3_000_000
    assert len(frames) == MAX_GRIDS
    assert str(frames[0]["data-caption"]).startswith("Step 500")
    assert str(frames[-1]["data-caption"]).startswith("Step 3,060")
    steps = [int(re.sub(r"Step ([\d,]+).*", r"\1", str(frame["data-caption"])).replace(",", "")) for frame in frames]
    positions = [0, *(steps[i] - 3000 + 5 for i in range(6, MAX_GRIDS))]
    assert set(np.diff(positions[1:])) <= {1, 2}  # 66 grids, 40 shown: evenly spaced


def test_same_folder_gives_same_bytes_and_no_other_file(run: Path) -> None:
    before = {path.name for path in run.iterdir()}
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first
    assert {path.name for path in run.iterdir()} - before == {"report.html", "report.md", "report.json"}


def test_damaged_lines_are_left_out_and_later_lines_count(run: Path) -> None:
    lines = ['{"step": 10, "critic_loss": 1}', '{"step": 20, "critic_loss": 2}{"step": 2', "[]", '{"critic_loss": 3}']
    lines += ['{"step": 10, "critic_loss": 4}', '{"step": 5, "critic_loss": NaN}', '{"step": 30, "critic_lo']
    (run / "metrics.jsonl").write_text("\n".join(lines))
    found = read_run(run)
    assert found.logged("critic_loss") == Line("critic_loss", [10.0], [4.0], smooth=True)
    assert found.logged("step").values == [5.0, 10.0]
    assert found.notes == ["metrics.jsonl: 4 damaged line(s); a killed run leaves one"]
    assert found.notes[0] in Page(write_report(run)).text
    assert found.notes[0] in (run / "report.md").read_text()


@pytest.mark.parametrize(
    ("kept", "headings"),
    [
        ({"config.yaml"}, ["Configuration"]),
        ({"metrics.jsonl"}, ["Training", "Time"]),
        ({"samples"}, ["A closer look at the samples"]),
        ({"config.yaml", "samples"}, ["A closer look at the samples", "Configuration"]),
        (
            {"evaluation"},
            [
                "FID in mnist features",
                "Scores over training",
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
    assert ("grids" in [attributes.get("id") for _, attributes in page.elements]) == ("samples" in kept)
    assert json.loads((run / "report.json").read_text())["run"] == "made"


def test_unfinished_run_says_how_far_it_came(run: Path) -> None:
    shutil.rmtree(run / "evaluation")
    for step in (2000, 2500, 3000):
        (run / "samples" / f"{step:05d}.png").unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(lines[:31]))
    page = Page(write_report(run))
    assert "unfinished, step 1,550 of 3,000" in page.text
    assert f"accelerate launch pipeline/evaluate.py {run}" in page.text
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
    assert "FID 136 at step 1,000" in page.text
    frames = [image for image in page.all("img") if "data-caption" in image]
    assert [str(frame["data-caption"])[:10] for frame in frames][-1] == "Step 2,500"
    assert "hidden" not in frames[-1]


def test_configuration_marks_what_differs_from_the_defaults(run: Path) -> None:
    with (run / "config.yaml").open("a") as file:
        file.write("added: {later: [1, 2]}\n")
    differences = read_run(run).differences
    assert differences == {
        "run.name": ("made", "wgan"),
        "training.steps": (3000, 40_000),
        "training.n_critic": (2, 5),
        "training.clip_value": (0.03, 0.01),
        "added.later": ([1, 2], "not in this version"),
    }
    page = Page(write_report(run))
    marked = [attributes for attributes in page.all("tr") if attributes.get("class") == "marked"]
    assert len(marked) == 2 * len(differences)  # once above, once among all settings
    assert "training. n_critic 2 5" in page.text


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
        assert len(page.all("script")) == ("closer look" in page.text)
        assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
        assert all(str(image["src"]).startswith("data:") for image in page.all("img"))
        assert HOSTILE in page.text
        assert "49" not in page.texts_of("h1")[0]
    outside_code = re.sub("`[^`]*`", "", (run / "report.md").read_text())
    assert "<" not in outside_code
    assert "FID" in outside_code


@pytest.mark.parametrize(
    ("fid", "floor", "words"),
    [
        (1.0, 0.9, "That is 1.1 times the floor of 0.900, which real test images score against the same real train "
                   "images: hardly any gap between generated and real images."),
        (3.6, 0.9, "a small gap"),
        (20.0, 1.0, "a clear gap"),
        (200.0, 1.0, "That is 200 times the floor of 1, which"),
        (12.3, None, "No floor was measured"),
        (None, 0.9, "measured no FID"),
    ],
)  # fmt: skip
def test_verdict(fid: float | None, floor: float | None, words: str) -> None:
    assert words in verdict(Evaluation(1, {"reference": "train"}, {"mnist": {"fid": fid, "fid_floor": floor}}), "mnist")


@pytest.mark.parametrize(
    ("value", "text"),
    [(45.23, "45.2"), (9.1, "9.10"), (212.4, "212"), (40000, "40,000"), (0.000123456, "0.000123"), (None, "—"),
     (float("nan"), "—"), ("7", "—"), (True, "—"), (10**400, "—")],
)  # fmt: skip
def test_number(value: object, text: str) -> None:
    assert number(value) == text


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
        "evaluation_share": pytest.approx(150 / 1050),
        "data_wait_share": pytest.approx(30 / 1050),
        "images_per_second": 425.0,  # alternates between 400 and 450
    }
    assert summary["differences"]["training.n_critic"] == {"value": 2, "default": 5}
    mail = (run / "report.md").read_text()
    assert mail.startswith(
        "# `made`: finished, 3,000 steps\n\n- **FID 45.2** (`mnist`, step 3,000, 10,000 images). That"
    )
    assert "`training.n_critic=2`" in mail
    assert len(mail.splitlines()) < 10


def test_best_step_is_named_when_it_is_not_the_last(run: Path) -> None:
    path = run / "evaluation" / "step-00002000.json"
    path.write_text(path.read_text().replace('"fid": 67.8', '"fid": 40.5'))
    assert "Best FID 40.5 at step 2,000" in Page(write_report(run)).text


def test_line_chart_takes_a_log_scale_only_where_it_serves() -> None:
    def is_log(values: list[float], floor: float | None = None) -> bool:
        return "log" in str(line_chart("Title", [Line("a", [1.0, 2.0, 3.0], values)], floor))

    assert is_log([1, 10, 21])
    assert not is_log([1, 10, 19])
    assert is_log([20, 15, 25], floor=0.9)
    assert not is_log([-1, 10, 100])
    assert not is_log([0, 10, 100])
    assert line_chart("Title", [Line("a", [], [])]) is None


def test_smoothing_keeps_a_constant_and_flattens_noise() -> None:
    def heights(values: list[float]) -> list[list[float]]:
        """Vertical positions of the raw and of the smoothed curve."""
        chart = str(line_chart("Title", [Line("a", [float(i) for i in range(200)], values, smooth=True)]))
        curves = [path for path in re.findall(r'<path d="([^"]+)"[^>]*stroke: var\(--line-0\)', chart)]
        return [[float(y) for y in re.findall(r"[ML] \S+ (\S+)", curve)] for curve in curves]

    raw, smooth = heights([5.0] * 200)
    assert np.ptp(raw) < 1e-6
    assert np.ptp(smooth) < 1e-6
    raw, smooth = heights([(-1.0) ** i for i in range(200)])
    assert np.ptp(smooth) < np.ptp(raw) / 3


def test_charts_are_described_and_follow_the_page_colours() -> None:
    lines = [Line("critic", [50.0, 3000.0], [-0.25, 12345.0])]
    chart = str(line_chart('Losses "<&', lines))
    assert "critic from -0.250 at step 50 to 12,345 at step 3,000" in chart
    assert "Losses &#34;&lt;&amp; over steps" in chart
    assert set(re.findall(r"#[0-9a-f]{6}\b", chart)) == set()
    assert "var(--line-0)" in chart
    bars = str(bar_chart("Shares", {"0": 0.25, "1": None, "two": 0.75}, {"two": 0.5}))
    assert 'aria-label="Shares: 0 0.250, two 0.750"' in bars
    assert bars.count("fill: var(--line-0)") == 2
    assert bar_chart("Shares", {"0": None}) is None
    assert bar_chart("Shares", "not bars") is None


def test_data_uri_is_lossless_where_it_fits_and_never_larger(tmp_path: Path) -> None:
    save_image(tmp_path / "noise.png", (700, 500), 0)
    large, few_pixels = data_uri(tmp_path / "noise.png", 1_000_000)
    assert decoded(large).size == (700, 500)
    assert not few_pixels
    with Image.open(tmp_path / "noise.png") as original:
        assert decoded(large).tobytes() == original.tobytes()
    small, _ = data_uri(tmp_path / "noise.png", 10_000)
    assert len(b64decode(small.partition(",")[2])) <= 10_000
    assert decoded(small).format == "WEBP"
    Image.new("RGB", (40, 30), (200, 10, 10)).save(tmp_path / "red.png")
    red, few_pixels = data_uri(tmp_path / "red.png", 10_000)
    assert decoded(red).getpixel((3, 3)) == (200, 10, 10)
    assert few_pixels


def test_compare_sets_runs_side_by_side(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "first", fid=45.2),
        make_run(tmp_path / "second", fid=30.1, n_critic=5),
        make_run(tmp_path / "third", fid=60.0),
    ]
    (runs[2] / "samples" / "03000.png").unlink()
    out = tmp_path / "new" / "out.html"
    assert compare(runs, out) == out
    page = Page(out)
    assert page.texts_of("h2") == ["Scores", "Scores over training", "Newest samples", "Settings that differ"]
    marked = page.source.partition('<tr class="marked">')[2].partition("</tr>")[0]
    assert "B second" in marked
    assert "30.1" in marked
    assert page.source.count('class="marked"') == 1
    settings_text = page.text.partition("Settings that differ")[2]
    assert settings_text.startswith(" Setting A first B second C third training.n_critic 2 5 2 One file")
    assert "not comparable" not in page.text
    fid_chart = re.findall(r"<svg.*?</svg>", page.source, flags=re.DOTALL)[0]
    assert [letter for letter in "ABC" if f">{letter}</text>" in fid_chart] == ["A", "B", "C"]
    assert {f"var(--line-{i})" for i in range(3)} <= set(re.findall(r"var\(--line-\d\)", fid_chart))
    assert len(page.all("img")) == 3
    assert "Step 2,500" in page.text
    assert "://" not in page.source


def test_compare_warns_of_scores_that_do_not_compare_and_takes_runs_without_any(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "first"), make_run(tmp_path / "second", num_images=5000), make_run(tmp_path / "third")]
    shutil.rmtree(runs[2] / "evaluation")
    page = Page(compare(runs, tmp_path / "out.html"))
    assert "These scores are not comparable" in page.text
    assert "C third — — — —" in page.text
    page = Page(compare([runs[0], runs[2]], tmp_path / "out.html"))
    assert "not comparable" not in page.text
    assert "None of them is evaluated yet" in Page(compare([runs[2]], tmp_path / "out.html")).text


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.write_text("file")])
def test_what_is_no_run_is_refused_in_one_line(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str], make: Callable[[Path], object]
) -> None:
    wrong, out = tmp_path / "wrong", tmp_path / "out.html"
    make(wrong)
    for arguments in ([str(wrong)], [str(run), str(wrong), "--out", str(out)]):
        assert main(arguments) == 2
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


def test_script_runs_without_torch(run: Path, tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "pipeline" / "report.py"
    done = subprocess.run([sys.executable, script, run], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout == f"{run / 'report.html'}\n"
    subprocess.run([sys.executable, script, run, run], capture_output=True, cwd=tmp_path, check=True)
    assert "2 runs side by side" in Page(tmp_path / "comparison.html").text
    code = "import sys, pipeline.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


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
def test_no_content_of_the_files_breaks_the_report(log: list[str], scores: object, environment: object) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        (run / "evaluation").mkdir()
        (run / "metrics.jsonl").write_text("\n".join(log), encoding="utf-8", errors="replace")
        evaluation = {"step": 5, "num_images": scores, "features": {"mnist": scores, "inception": environment}}
        (run / "evaluation" / "step-00000005.json").write_text(json.dumps(evaluation))
        (run / "evaluation" / "step-00000006.json").write_text(json.dumps(scores))
        (run / "environment.json").write_text(json.dumps(environment))
        (run / "config.yaml").write_text(json.dumps({"training": scores, "run": environment}))
        Page(write_report(run))
        Page(compare([run, run], run / "out.html"))


# -- in a browser ------------------------------------------------------------------------------------------------------

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync --hide-scrollbars --remote-debugging-pipe"


class Browser:
    """Headless Chromium, told what to do through its debugging pipe: JSON messages that end with a zero byte."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        # Chromium reads from 3 and writes to 4; numbers from 10 on cannot be in the way of that.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (theirs_in, theirs_out)]
        redirect = f'exec "$@" 3<&{ends[0]} 4>&{ends[1]}'
        command = ["bash", "-c", redirect, "-", CHROMIUM, *FLAGS.split(), f"--user-data-dir={profile}"]
        self.process = subprocess.Popen(command, pass_fds=ends, stderr=subprocess.DEVNULL)
        for end in (theirs_in, theirs_out, *ends):
            os.close(end)
        self.output, self.input = os.fdopen(ours_out, "wb", buffering=0), os.fdopen(ours_in, "rb")
        self.events: list[dict[str, Any]] = []
        self.session, self.last_id = "", 0
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Page.setLifecycleEventsEnabled", enabled=True)

    def _receive(self) -> dict[str, Any]:
        message = bytearray()
        while (byte := self.input.read(1)) != b"\0":
            assert byte, "the browser has gone"
            message += byte
        found: dict[str, Any] = json.loads(message)
        return found

    def call(self, method: str, **params: object) -> dict[str, Any]:
        self.last_id += 1
        message: dict[str, object] = {"id": self.last_id, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        self.output.write(json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self.last_id:
            self.events.append(answer)
        result: dict[str, Any] = answer["result"]
        return result

    def open(self, path: Path, width: int, scheme: str) -> None:
        """Loads the page; `events` then holds what it did."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=844, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.events.clear()
        loader = self.call("Page.navigate", url=path.as_uri())["loaderId"]
        loaded = {"name": "load", "loaderId": loader}
        while not any(loaded.items() <= event["params"].items() for event in self.events):
            self.events.append(self._receive())

    def evaluate(self, expression: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def close(self) -> None:
        self.call("Browser.close")
        self.process.wait(30)
        self.output.close()
        self.input.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if not CHROMIUM:
        pytest.skip("no chromium is installed")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def contrast(first: str, second: str) -> float:
    """WCAG 2 contrast ratio of two CSS colours `rgb(r, g, b)`."""

    def luminance(colour: str) -> float:
        channels = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
        linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_pages_in_a_browser(browser: Browser, tmp_path: Path, width: int, scheme: str) -> None:
    run, other = make_run(tmp_path / ("run-with-a-long-name-" * 8)), make_run(tmp_path / "other", n_critic=3)
    for path in (write_report(run), compare([run, other, run], tmp_path / "out.html")):
        browser.open(path, width, scheme)
        assert browser.evaluate("[innerWidth, document.documentElement.scrollWidth]") == [width, width]
        sticking_out = "[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll') && "
        sticking_out += "e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 200))"
        assert browser.evaluate(sticking_out) == []
        assert browser.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
        colours = "(([s, p]) => [getComputedStyle(document.querySelector(s))[p]])"
        for selector in ("h3", "figcaption", "td", "summary", ".marked td"):
            if browser.evaluate(f"document.querySelector('{selector}') !== null"):
                ink = browser.evaluate(f"{colours}(['{selector}', 'color'])[0]")
                paper = browser.evaluate(
                    f"{colours}(['{'.marked td' if 'td' in selector else '.card'}', 'backgroundColor'])[0]"
                )
                assert contrast(ink, paper) >= 4.5
                assert (contrast(paper, "rgb(0, 0, 0)") < 4.5) == (scheme == "dark")
        chart_text = browser.evaluate(f"{colours}(['svg text', 'fill'])[0]")
        assert contrast(chart_text, browser.evaluate(f"{colours}(['.card', 'backgroundColor'])[0]")) >= 4.5
        requests = [
            event["params"]["request"]["url"]
            for event in browser.events
            if event["method"] == "Network.requestWillBeSent"
        ]
        assert [url for url in requests if not url.startswith("data:")] == [path.as_uri()]
        wrong = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded", "Network.loadingFailed")
        assert [event for event in browser.events if event["method"] in wrong] == []


@pytest.mark.browser
def test_slider_in_a_browser(browser: Browser, run: Path) -> None:
    browser.open(write_report(run), 390, "light")
    visible = "[...document.querySelectorAll('#grids img')].map(image => image.offsetHeight > 0)"
    assert browser.evaluate(visible) == [False] * 5 + [True]
    browser.evaluate("slider.value = 1; slider.dispatchEvent(new Event('input'))")
    assert browser.evaluate(visible) == [False, True] + [False] * 4
    assert (
        browser.evaluate("document.querySelector('#grids output').textContent") == "Step 1,000 · FID 136 at step 1,000"
    )
    assert browser.evaluate("slider.getAttribute('aria-valuetext')") == "Step 1,000 · FID 136 at step 1,000"
    browser.evaluate("button.click()")
    assert browser.evaluate("button.textContent") == "Pause"
    ended = "new Promise(resolve => setInterval(() => button.textContent === 'Play' && resolve(slider.value), 20))"
    assert browser.evaluate(ended) == "5"
    assert browser.evaluate(visible) == [False] * 5 + [True]
