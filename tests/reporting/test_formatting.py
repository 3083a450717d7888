"""How a report words numbers and scores."""

from __future__ import annotations

import pytest

from pipeline.reporting.formatting import number, verdict
from pipeline.reporting.read import Evaluation


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
