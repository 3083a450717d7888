"""What is read from a run's folder, and what a damaged one leaves out."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from base64 import b64encode
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import UserError
from pipeline.reporting.page import write_report
from pipeline.reporting.read import Curve, is_run, read_run
from pipeline.storage.run_folder import RunFolder
from tests.reporting.made_runs import Page


def test_damaged_lines_are_left_out_and_later_lines_count(run: Path) -> None:
    lines = ['{"step": 10, "critic_loss": 1}', '{"step": 20, "critic_loss": 2}{"step": 2', "[]", '{"critic_loss": 3}']
    lines += ['{"step": 10, "critic_loss": 4}', '{"step": 5, "critic_loss": NaN}', '{"step": 30, "critic_lo']
    (run / "metrics.jsonl").write_text("\n".join(lines))
    found = read_run(run)
    assert found.logged("critic_loss") == Curve([10.0], [4.0])
    assert found.logged("step").values == [5.0, 10.0]
    assert found.notes == ["metrics.jsonl: 4 damaged lines; a killed run leaves one"]
    assert found.notes[0] in Page(write_report(run)).text
    assert found.notes[0] in (run / "report.md").read_text()


@pytest.mark.parametrize("name", ["samples", "evaluation", "checkpoints"])
def test_a_folder_of_runs_is_none_whatever_they_are_called(name: str, run: Path) -> None:
    root = run.parent
    run.rename(root / name)
    assert is_run(root / name)
    assert not is_run(root)
    assert not RunFolder(root).has_begun


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
    assert len(marked) == 1 + len(differences)  # the best evaluation; among all settings
    assert "training. n_critic 2 5" in page.text


def test_feature_sets_have_one_order_the_packages_own_first(run: Path) -> None:
    """Sets of names have another order in every process: the same folder must give the same bytes in each."""
    path = run / "evaluation" / "step-00003000.json"
    content = json.loads(path.read_text())
    content["features"] |= {name: {"fid": 1.0} for name in "gfedcba"}
    path.write_text(json.dumps(content))
    assert read_run(run).features == ["mnist", *"abcdefg"]


def test_curves_hold_what_compares(run: Path) -> None:
    """Scores of as many neighbours, and critics beside the same kind of weights."""
    path = run / "evaluation" / "step-00001000.json"
    content = json.loads(path.read_text())
    content["features"]["mnist"]["provenance"]["neighbours"] = 5
    path.write_text(json.dumps(content))
    path = run / "evaluation" / "step-00002000.json"
    content = json.loads(path.read_text()) | {"critic": "none"}
    path.write_text(json.dumps(content))
    found = read_run(run)
    assert found.scored("mnist", "precision").steps == [2000, 3000]
    assert found.scored("mnist", "fid").steps == [1000, 2000, 3000]
    assert found.of_critic("test_gap") == Curve([1000, 3000], [0.019, 0.017])
    path.write_text(json.dumps(content | {"critic": {"test_gap": 1.0}, "weights": "raw"}))
    assert read_run(run).of_critic("test_gap").steps == [1000, 3000]


def test_a_notebook_shows_the_newest_samples_and_a_line(run: Path) -> None:
    shown = read_run(str(run))
    assert "\n" not in repr(shown)
    assert repr(shown).startswith(f"<Run {run}: finished, 3,000 steps; mnist FID ")
    assert b64encode(shown.grids[-1][1].read_bytes()).decode() in shown._repr_html_()
    assert "mnist FID" in shown._repr_html_()
    assert b64encode(shown.plot()._repr_png_()).decode() in shown._repr_html_()
    bare = dataclasses.replace(shown, grids=[], log=[], evaluations=[])
    assert bare._repr_html_().endswith(f"<code>{repr(bare)[1:-1]}</code>")
    assert "<img" not in bare._repr_html_()
    assert repr(shown.latest) == "<Evaluation of step 3000: mnist FID 45.2>"


def test_a_stop_between_two_lines_of_the_log_leaves_the_saved_step(run: Path) -> None:
    for name in ("step-00003095", "step-00003100.tmp", "step-00003000"):
        (run / "checkpoints" / name).mkdir(parents=True)
    stopped = read_run(run)
    assert stopped.checkpoints == [3000, 3095]
    assert stopped.step == 3095


def test_times_are_those_of_the_newest_checkpoint_where_the_log_ends_before_an_evaluation(run: Path) -> None:
    before = read_run(run).timing
    assert (before["total_seconds"], before["evaluation_share"]) == (1050, 150 / 1050)
    for step, seconds in ((2000, 100.0), (3000, 250.0)):
        (manifest := run / f"checkpoints/step-{step:08d}/manifest.json").parent.mkdir(parents=True)
        progress = {"elapsed_seconds": 0.3 * step, "evaluation_seconds": seconds}
        manifest.write_text(json.dumps({"step": step, "progress": progress}))
    after = read_run(run).timing
    assert (after["total_seconds"], after["evaluation_share"]) == (1150, 250 / 1150)
    assert after["device_seconds"] == 4 * 1150
    manifest.write_text("{")
    assert read_run(run).timing == before
    for step, seconds in ((1000, 50.0), (2000, 50.0), (3000, 250.0)):
        path = run / f"evaluation/step-{step:08d}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"timing": {"seconds": seconds}}))
    assert read_run(run).timing["evaluation_share"] == 350 / 1250
    assert "manifest.json is damaged" in read_run(run).notes


def test_a_plot_has_the_losses_and_each_spaces_fid(run: Path) -> None:
    losses, scores = read_run(run).plot().axes
    assert [line.get_label() for line in losses.lines] == ["critic", "generator"]
    points = np.asarray(scores.lines[0].get_xydata()).tolist()
    assert points == [[1000, pytest.approx(135.6)], [2000, pytest.approx(67.8)], [3000, pytest.approx(45.2)]]
    assert len(scores.collections) == 1  # the interval
    assert read_run(run).plot()._repr_png_().startswith(b"\x89PNG")
    (run / "metrics.jsonl").write_text("")
    assert [axes.get_title() for axes in read_run(run).plot().axes] == ["FID"]


def test_a_name_that_no_score_or_column_has_is_refused_and_one_that_is_missing_is_none(run: Path) -> None:
    found = read_run(run)
    assert found.latest is not None
    assert found.latest.score("mnist", "coverage") is None
    assert found.latest.score("own", "fid") is None
    assert found.latest.score("mnist", "kid_mean_floor") is None
    assert found.logged("generator_grad_norm") == Curve([], [])
    with pytest.raises(UserError, match="no score is called fidd: there are fid, fid_floor, "):
        found.latest.score("mnist", "fidd")
    with pytest.raises(UserError, match="no column of the log is called critic: there are step, critic_loss, "):
        found.logged("critic")


def test_a_band_ends_at_zero(run: Path) -> None:
    path = run / "evaluation/step-00003000.json"
    path.write_text(path.read_text().replace("[0.07, 0.0742]", "[-0.07, 0.0742]"))
    band = read_run(run).scored("mnist", "mode_kl", "mode_kl_interval").band
    assert band is not None
    assert band[-1] == (0, 0.0742)


def test_a_table_has_the_log_and_the_scores_by_step(run: Path) -> None:
    pytest.importorskip("pandas")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "critic_loss": NaN}\n{"step": "4e1", "critic_loss": 7}\n')
    table = read_run(run).dataframe()
    assert table.index.name == "step"
    assert list(table.index) == [10, *range(50, 3001, 50)]
    assert table.loc[3000, "critic_loss"] == pytest.approx(-0.2 / 3000)
    assert table.loc[3000, "mnist/fid"] == pytest.approx(45.2)
    assert math.isnan(table.loc[2950, "mnist/fid"])
    assert math.isnan(table.loc[10, "critic_loss"])
    assert "mnist/class_histogram" not in table.columns
    assert len(dataclasses.replace(read_run(run), log=[], evaluations=[]).dataframe()) == 0


def test_a_table_without_pandas_says_what_to_install(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UserError, match=r"needs pandas: pip install 'gan-pipeline\[notebook\]'"):
        read_run(run).dataframe()
