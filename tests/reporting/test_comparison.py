"""Comparisons: the order, seeds together, what is found by pattern, and the numbers beside the page."""

from __future__ import annotations

import csv
import json
import random
import statistics
from pathlib import Path

import pytest
import yaml
from PIL import Image

from pipeline.errors import UserError
from pipeline.report import main
from pipeline.reporting.comparison import find_runs, rank_runs
from pipeline.reporting.page import compare
from pipeline.reporting.read import read_run
from tests.reporting.made_runs import Page, make_run


def seeded(folder: Path, fid: float, seed: int, n_critic: int = 2, **run: object) -> Path:
    path = make_run(folder, fid, n_critic)
    config = yaml.safe_load((path / "config.yaml").read_text())
    config["training"]["seed"] = seed
    config["run"] |= run
    config["runtime"]["threads"] = seed + 1  # does not alter the trajectory
    if seed == 0:
        del config["run"]["start_from"]  # null elsewhere; a run of an earlier version lacks it
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    return path


def test_runs_come_in_the_order_of_their_scores(tmp_path: Path) -> None:
    fids = [9.5, 80.0, 12.25, 30.0, 11.0]
    runs = [make_run(tmp_path / f"run-{fid}", fid) for fid in fids]
    unlike, unscored = make_run(tmp_path / "unlike", 1.0, num_images=5000), make_run(tmp_path / "unscored")
    for path in (unscored / "evaluation").iterdir():
        path.unlink()
    mixed = [*runs, unlike, unscored]
    for seed in range(3):
        random.Random(seed).shuffle(mixed)
        found = rank_runs([read_run(path) for path in mixed])
        assert [run.name for run in found.runs.values()] == [
            *(f"run-{fid}" for fid in sorted(fids)),
            "unlike",
            "unscored",
        ]
        assert found.unlike == {"F": ["num_images is 5,000, not 10,000"]}
        assert found.best == 0
        assert found.to_markdown().endswith(
            " |\n\n- `F unlike does not compare with A: num_images is 5,000, not 10,000.`\n"
        )


def test_seeds_of_one_configuration_are_a_median_and_a_spread(tmp_path: Path) -> None:
    fids = {2: [30.0, 50.0, 34.0], 5: [41.0, 31.0]}
    for n_critic, values in fids.items():
        for seed, fid in enumerate(values):
            seeded(tmp_path / f"c{n_critic}-seed-{seed}", fid, seed, n_critic, name=f"c{n_critic}-{seed}")
    make_run(tmp_path / "alone", 35.5, 7)
    page = Page(compare(find_runs([str(tmp_path)]), tmp_path / "comparison.html"))
    assert page.texts_of("h2")[:3] == ["Scores", "Seeds together", "Newest samples"]
    text = page.text.partition("Seeds together")[2]
    assert "c2 A C F 34 (30 to 50)" in text
    assert text.index("c2 A C F") < text.index("alone D 35.5") < text.index("c5 B E 36 (31 to 41)")
    content = json.loads((tmp_path / "comparison.json").read_text())
    groups = {group["configuration"]: group for group in content["configurations"]}
    assert list(groups) == ["c2", "alone", "c5"]
    for n_critic, values in fids.items():
        seen = groups[f"c{n_critic}"]["fid"]
        assert seen == {"median": statistics.median(values), "spread": [min(values), max(values)]}
    table = (tmp_path / "comparison.md").read_text().replace("\u00a0", " ").splitlines()
    titles = "Configuration,Runs,FID,IS,KID,Precision,Recall,Modes,KL of modes,Step,Images/s,Time,Cost"
    assert table[0] == f"| {' | '.join(titles.split(','))} |"
    assert table[4].startswith("| c5 | B E | 36 (31 to 41) | 9.30 |")
    assert table[4].endswith("| 3,000 | 425 | 18 min | 4,200 core s |")


def test_a_run_with_another_number_of_neighbours_says_so(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "first", 30.0), make_run(tmp_path / "second", 31.0)]
    path = runs[1] / "evaluation/step-00003000.json"
    path.write_text(path.read_text().replace('"neighbours": 3', '"neighbours": 5'))
    first, second = rank_runs([read_run(path) for path in runs]).scores_table
    assert (first["Precision"], first["State"]) == ("0.800", "finished, 3,000 steps")
    assert (second["Precision"], second["KID"]) == ("—", "0.0300")
    assert second["State"] == "finished, 3,000 steps; precision and recall of k = 5 do not compare"


def test_there_may_be_more_runs_than_letters(run: Path) -> None:
    found = rank_runs([read_run(run)] * 28)
    assert found.configurations[0][1][-3:] == ["Z", "A1", "B1"]
    assert found.scores_table[-1]["Run"] == "B1 made"


def test_runs_of_one_seed_are_not_taken_together(tmp_path: Path) -> None:
    runs = [seeded(tmp_path / "one", 30, 0), seeded(tmp_path / "same", 31, 0), seeded(tmp_path / "other", 32, 1, 5)]
    found = rank_runs([read_run(path) for path in runs])
    assert not found.has_seeds
    assert "Seeds together" not in Page(compare(runs, tmp_path / "out.html")).text


def test_the_numbers_are_beside_the_page(tmp_path: Path) -> None:
    runs = [seeded(tmp_path / 'b,"quoted"', 45.25, 1, 5), make_run(tmp_path / "a", 30.5)]
    compare(runs, tmp_path / "out.html")
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], float(row["fid"]), row["training.n_critic"]) for row in rows] == [
        ("a", 30.5, "2"),
        ('b,"quoted"', 45.25, "5"),
    ]
    content = json.loads((tmp_path / "out.json").read_text(), parse_constant=pytest.fail)
    assert [run["fid"] for run in content["runs"]] == [30.5, 45.25]
    assert content["features"] == "mnist"
    assert [(run["device_seconds"], run["devices"]) for run in content["runs"]] == [(4200, "core")] * 2
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.size == (2 * 312 + 8, 336 + 8)


def test_runs_are_found_by_path_pattern_and_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("runs/a", "runs/b", "runs/sweep/c", "runs/study/trial-0/d"):
        make_run(tmp_path / name)
    main(["runs/*"])
    assert capsys.readouterr().out == "runs/comparison.html\n"
    (tmp_path / "runs/evaluations").mkdir()
    every = [Path("runs/a"), Path("runs/b"), Path("runs/study/trial-0/d"), Path("runs/sweep/c")]
    assert find_runs([str(path) for path in sorted(Path("runs").iterdir())]) == every, "as a shell writes it out"
    assert find_runs(["runs"]) == find_runs(["runs/*"]) == every
    assert [path.relative_to(tmp_path) for path in find_runs([f"{tmp_path}/runs/*"])] == every
    assert find_runs(["runs/?", "runs/a", "./runs/a"]) == every[:2]
    for wrong, message in [
        ("runs/x*", r"runs/x\* is not a folder"),
        ("runs/evaluations", "runs/evaluations is not a run"),
        ("nowhere", "nowhere is not a folder"),
    ]:
        with pytest.raises(UserError, match=message):
            find_runs([wrong])
    with pytest.raises(UserError, match=r"--out is page\.txt: name a page \.html"):
        main(["runs/a", "--out", "page.txt"])
