"""How a report words numbers and scores."""

from __future__ import annotations

import pytest

from pipeline.reporting import counted, few_images, number
from pipeline.reporting.page import verdict
from pipeline.reporting.read import Evaluation


@pytest.mark.parametrize(
    ("fid", "floor", "words"),
    [
        (1.0, 0.9, "That is 1.1 times the floor of 0.900, which 500 real test images score against the same real train "
                   "images: hardly any gap between generated and real images."),
        (3.6, 0.9, "a small gap"),
        (20.0, 1.0, "a clear gap"),
        (200.0, 1.0, "That is 200 times the floor of 1, which"),
        (12.3, None, "No floor, because none was measured: the number only ranks"),
        (None, 0.9, "measured no FID"),
    ],
)  # fmt: skip
def test_verdict(fid: float | None, floor: float | None, words: str) -> None:
    assert words in verdict_of(500, 500, fid=fid, fid_floor=floor)


def verdict_of(num_images: int, floor_images: int | None, **scores: float | None) -> str:
    found: dict[str, dict[str, object]] = {"mnist": scores | {"images": {"fid_floor": floor_images}}}
    return verdict(Evaluation(1, {"reference": "train", "num_images": num_images}, found), "mnist")


def test_the_verdict_says_where_the_floor_is_of_another_number_of_images() -> None:
    assert verdict_of(500, 500, fid=7.3, fid_floor=7.2).endswith("hardly any gap between generated and real images.")
    assert verdict_of(50_000, 10_000, fid=7.3, fid_floor=7.2).endswith(
        "There are no more of them: with 50,000 the floor would be lower."
    )
    assert "How many test images gave the floor is not told" in verdict_of(500, None, fid=7.3, fid_floor=1.04)


def test_a_score_without_a_floor_says_why() -> None:
    def floor(score: str, **images: int | None) -> str:
        return Evaluation(1, {"reference": "train"}, {"mnist": {"images": images}}).floor("mnist", score)

    for score in ("fid", "mode_kl"):
        assert floor(score, fid_floor=None) == "no floor, because the real images have no test split"
    assert floor("mode_kl", fid_floor=500) == ("no floor, because the dataset's classes are not those of the features")
    assert Evaluation(1, {}, {"own": {"fid_floor": 1.04}}).floor("own") == "floor 1.04"


@pytest.mark.parametrize(
    ("divergence", "words"),
    [
        (0.0, "below the floor 0.00181: more even than real images"),
        (0.00181, "floor 0.00181"),
        (0.1, "floor 0.00181"),
        (None, "floor 0.00181"),
    ],
)
def test_a_divergence_below_its_floor_is_explained(divergence: float | None, words: str) -> None:
    scores: dict[str, object] = {"mode_kl": divergence, "mode_kl_floor": 0.00181}
    assert Evaluation(1, {}, {"own": scores}).floor("own", "mode_kl") == words


def test_nouns_agree_with_their_numbers() -> None:
    assert [counted(count, "mode") for count in (1, 1.0, 0, 1000, None)] == [
        *("1 mode", "1 mode", "0 modes", "1,000 modes", "— modes")
    ]


def test_few_images_are_those_below_2000() -> None:
    assert few_images(2000) is None
    assert few_images("?") is None
    assert few_images(2000, 1999) == (
        "only 1,999 real images: more would give lower FIDs, compare only FIDs against these same images"
    )
    rest = "below 2,000 FID depends more on their number than on what they show"
    assert few_images(1, 1) == f"only 1 image is scored: {rest}"
    assert few_images(20) == f"only 20 images are scored: {rest}"


@pytest.mark.parametrize(
    ("value", "text"),
    [(45.23, "45.2"), (9.1, "9.10"), (212.4, "212"), (40000, "40,000"), (0.000123456, "0.000123"), (None, "—"),
     (float("nan"), "—"), ("7", "—"), (True, "—"), (10**400, "—")],
)  # fmt: skip
def test_number(value: object, text: str) -> None:
    assert number(value) == text
