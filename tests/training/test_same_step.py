"""Ranks that compute otherwise are named, with their hosts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipeline.training.same_step import Computed, findings
from tests.jobs import ROOT, TINY, launch


def rank(number: int, *rounds: str, kind: str = "CPU") -> Computed:
    """Each round's result is a letter a tensor."""
    return Computed(f"host{number}", kind, [dict(zip(("weight", "bias"), letters, strict=True)) for letters in rounds])


@pytest.mark.parametrize(
    ("results", "errors"),
    [
        ([rank(0, "ab", "ab"), rank(1, "ab", "ab")], []),
        ([rank(0, "ab", "ab"), rank(1, "cd", "cd", kind="GPU")], []),  # others round in another order
        (
            [rank(0, "ab", "ab"), rank(1, "ab", "ax"), rank(2, "ab", "ab")],
            ["rank 1 on host1 got two results from the same 3 steps (in bias);"],
        ),
        (
            [rank(0, "xb", "xb"), rank(1, "ab", "ab"), rank(2, "ab", "ab")],
            ["rank 0 on host0 computes otherwise than the 2 others like it, after the same 3 steps (in weight);"],
        ),
        (
            [rank(0, "ab", "ab"), rank(1, "ax", "ax")],
            ["rank 0 on host0, 1 on host1 disagree after the same 3 steps (in bias);"],
        ),
        (
            [rank(number, f"a{letter}", f"a{letter}") for number, letter in enumerate("bxbyb")],
            ["rank 1 on host1, 3 on host3 computes otherwise than the 3 others like it, after the same 3 steps (in b"],
        ),
    ],
)
def test_who_is_named(results: list[Computed], errors: list[str]) -> None:
    found = findings(results)
    if not errors:
        assert [finding.level for finding in found] == ["ok"]
    else:
        assert [finding.level for finding in found] == ["error"] * len(errors)
        for finding, error in zip(found, errors, strict=True):
            assert finding.text.startswith(error), finding.text


def test_a_rank_that_computes_wrong_is_named_by_the_doctor(tiny_dataset: Path, tmp_path: Path) -> None:
    place = ["--data.dataset", str(tiny_dataset), "--run.root", str(tmp_path), "--training.batch_size", "48"]
    result = launch(ROOT / "tests/checks/faulty_rank.py", [*TINY, *place, "--thorough"], 3)
    assert result.returncode == 2, result.stderr[-3000:]
    named = re.findall(r"^error +(.*)$", result.stdout, re.MULTILINE)
    assert len(named) == 1, result.stdout
    assert re.match(r"arithmetic: rank 2 on \S+ computes otherwise than the 2 others like it, after the same", named[0])
