"""The metrics in anybody's loop: ranks, batches, collections, and what torchmetrics' own stumble over."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from pipeline.distributed.collectives import Ranks
from pipeline.evaluation.metrics import (
    Authenticity,
    ClassScores,
    FeatureMetric,
    FrechetDistance,
    InceptionScore,
    KernelDistance,
    ManifoldScores,
    SlicedWasserstein,
)
from pipeline.evaluation.metrics.states import Batch, ClassSums, Sample, Sums
from pipeline.rng import sampling_order
from tests.evaluation.metrics_many import CLASSES, WIDTH, made_up
from tests.jobs import ROOT, launch

MAKERS: dict[str, Callable[[], FeatureMetric]] = {
    "fid": lambda: FrechetDistance(WIDTH),
    "inception_score": lambda: InceptionScore(WIDTH, keep=150),
    "kid": lambda: KernelDistance(WIDTH, keep=150),
    "manifold": lambda: ManifoldScores(WIDTH, keep=150),
    "sliced_wasserstein": lambda: SlicedWasserstein(WIDTH, keep=150),
    "authenticity": lambda: Authenticity(WIDTH, scored=100, keep=150),
    "classes": lambda: ClassScores(WIDTH, WIDTH),
}


@pytest.fixture(params=MAKERS)
def make(request: pytest.FixtureRequest) -> Callable[[], FeatureMetric]:
    return MAKERS[request.param]


def feed(metric: FeatureMetric, first: int = 0, last: int = 300, size: int = 50) -> None:
    """Images first, ..., last - 1 of both sides."""
    for real in (False, True):
        for rows in torch.split(made_up(int(real), 300)[first:last], size):
            metric.update(**metric._filter_kwargs(features=rows, logits=rows, real=real))


def values(metric: FeatureMetric) -> dict[str, Any]:
    found = metric.compute()
    return {name: score.tolist() for name, score in (found if isinstance(found, dict) else {"": found}).items()}


def close(ours: Any, theirs: Any) -> bool:
    """Equal to the rounding of sums."""
    return bool(ours.keys() == theirs.keys()) and all(
        np.allclose(ours[name], theirs[name], rtol=1e-9, atol=1e-12, equal_nan=True) for name in ours
    )


@pytest.mark.slow
def test_scores_depend_neither_on_the_ranks_nor_on_the_batches(tmp_path: Path) -> None:
    """2,501 generated images and 3,087 real ones, dealt to 1, 2 and 4 ranks, of which one gets none."""
    found = []
    for world_size in (1, 2, 4):
        output = tmp_path / f"world{world_size}"
        arguments = [str(output), *("7", "64", "1000")[0 if world_size < 4 else 2 :]]
        result = launch(ROOT / "tests/evaluation/metrics_many.py", arguments, world_size)
        assert result.returncode == 0, result.stderr[-4000:]
        ranks = [json.loads(Path(f"{output}.{rank}").read_text()) for rank in range(world_size)]
        assert all(rank == ranks[0] for rank in ranks), "every rank is given the same"
        found += ranks[0]
    expected = found[0]
    assert 0 < expected["precision"] < 1
    assert 0 < expected["recall"] < 1
    assert 0 < expected["authenticity"] < 1
    assert expected["fid"] > 0
    assert expected["sliced_wasserstein"] > 0
    assert all(score > 0 for score in expected["fid_per_class"])
    assert len(expected["class_histogram"]) == CLASSES
    for scores in found[1:]:
        for name, value in expected.items():
            if name.startswith(("is_", "kid_", "precision", "recall", "density", "coverage", "sliced", "authentic")):
                assert scores[name] == value, name  # in every bit: the same rows in the same order
            else:
                assert scores[name] == pytest.approx(value, rel=1e-9, nan_ok=True), name


def test_the_sample_is_the_first_of_the_order_and_bounded() -> None:
    """However the images come; and no two share a place."""
    rows, order = made_up(0, 2000), sampling_order(torch.arange(2000))
    assert len(set(order.tolist())) == 2000
    assert (order[:1000] < order.median()).double().mean().item() == pytest.approx(0.5, abs=0.05)
    expected = order.argsort()[:100].sort().values
    for size, seed in ((7, 0), (30, 1), (999, 2), (2000, 3)):
        sample = Sample(WIDTH, keep=100)
        for indices in torch.split(torch.randperm(2000, generator=torch.Generator().manual_seed(seed)), size):
            sample.add(Batch(rows[indices], indices=indices))
            assert sum(len(some) for some in sample._rows) <= 125
        kept, indices = sample.first()
        assert torch.equal(indices, expected)
        assert torch.equal(kept, rows[expected])
        assert sample.seen == 2000
        fewer, first = sample.first(10)
        assert torch.equal(first, order.argsort()[:10].sort().values)
        assert torch.equal(fewer, rows[first])


def test_an_update_keeps_a_copy() -> None:
    metric, rows = KernelDistance(WIDTH), made_up(0, 10)
    metric.update(rows, real=False)
    rows.zero_()
    assert metric.fake["features"].first()[0].any()


def test_reset_begins_anew(make: Callable[[], FeatureMetric]) -> None:
    fresh, used = make(), make()
    feed(used, 100)
    used.reset()
    feed(fresh)
    feed(used)
    assert close(values(fresh), values(used))


def test_forward_accumulates_and_gives_the_batch(make: Callable[[], FeatureMetric]) -> None:
    """torchmetrics' forward resets the states for the batch's value: images must be numbered on all the same."""
    stepped, fed = make(), make()
    feed(fed)
    for real in (False, True):
        for rows in torch.split(made_up(int(real), 300), 50):
            stepped(**stepped._filter_kwargs(features=rows, logits=rows, real=real))
    assert close(values(stepped), values(fed))
    if "features" in stepped.fake:
        assert len(set(stepped.fake["features"].first()[1].tolist())) == 150


def test_pickled_in_the_middle_it_goes_on(make: Callable[[], FeatureMetric]) -> None:
    metric, whole = make(), make()
    feed(metric, 0, 100)
    metric = pickle.loads(pickle.dumps(metric))
    feed(metric, 100)
    feed(whole, 0, 100)
    feed(whole, 100)
    assert close(values(metric), values(whole))


@pytest.mark.parametrize(
    "change", [lambda m: m.to(torch.float32), lambda m: m.set_dtype(torch.float16), nn.Module.half]
)
def test_no_change_of_type_rounds_the_states(
    make: Callable[[], FeatureMetric], change: Callable[[FeatureMetric], object]
) -> None:
    changed, plain = make(), make()
    for metric in (changed, plain):
        feed(metric, 0, 100)
    change(changed)
    for metric in (changed, plain):
        feed(metric, 100)
    assert close(values(changed), values(plain))
    assert all(score.dtype == torch.float64 for score in MetricCollection({"any": changed}).compute().values())


def test_a_state_can_be_kept_and_is_that_of_all_ranks() -> None:
    """Of two ranks, each with every other image, played by one: what is gathered is what one rank has of all."""

    class Both(Ranks):
        def gather(self, value: Any) -> list[Any]:
            return [value, others.pop(0)]

    rows, logits = made_up(0, 400), made_up(1, 400)
    for make in (lambda: Sums(WIDTH), lambda: Sample(WIDTH, 150), lambda: ClassSums(WIDTH, WIDTH)):
        whole, mine, theirs = make(), make(), make()
        indices = torch.arange(400)
        whole.add(Batch(rows, logits, indices, indices % WIDTH))
        for state, some in ((mine, indices[::2]), (theirs, indices[1::2])):
            state.add(Batch(rows[some], logits[some], some, some % WIDTH))
        others: list[Any] = (
            [theirs.first()[1], (*theirs.first(), theirs.seen)] if isinstance(theirs, Sample) else [theirs.tensors]
        )
        mine.gather(Both(0, 2))
        for name, tensor in whole.tensors.items():
            torch.testing.assert_close(mine.tensors[name], tensor, rtol=1e-12, atol=1e-12)
    empty, nothing = Sample(WIDTH, 150), Sample(WIDTH, 150).first()
    others = [nothing[1], (*nothing, 0)]
    empty.gather(Both(0, 2))
    assert empty.first()[0].shape == (0, WIDTH), "of a side that no rank has images of"
    sample = Sample(WIDTH, 150)
    sample.add(Batch(rows))
    for keep in (150, 100):
        restored = Sample.of_tensors(sample.tensors, keep)
        assert all(map(torch.equal, restored.first(), sample.first(keep)))
        assert (restored.seen, restored.size) == (400, keep)


def test_few_images_give_nan_and_none_do_no_harm(make: Callable[[], FeatureMetric]) -> None:
    metric, whole = make(), make()
    for real in (False, True):
        metric.update(**metric._filter_kwargs(features=made_up(0, 0), logits=made_up(0, 0), real=real))
    assert all(np.isnan(value).all() for name, value in values(metric).items())
    feed(metric)
    feed(whole)
    assert close(values(metric), values(whole))


def test_a_collection_shares_no_states_that_will_differ() -> None:
    """After the first batch all of these hold the same rows, and torchmetrics looks for that."""
    metrics: dict[str, Any] = {
        "small": KernelDistance(WIDTH, keep=100),
        "large": KernelDistance(WIDTH, keep=200),
        "seed": KernelDistance(WIDTH, keep=200, seed=1),
        "manifold": ManifoldScores(WIDTH, keep=150),
        "sliced": SlicedWasserstein(WIDTH, keep=150),
        "authenticity": Authenticity(WIDTH, keep=200),
        "fid": FrechetDistance(WIDTH),
    }
    alone = {name: pickle.loads(pickle.dumps(metric)) for name, metric in metrics.items()}
    collection = MetricCollection({**metrics})
    for real in (False, True):
        for rows in torch.split(made_up(int(real), 300), 50):
            collection.update(rows, real)
            for metric in alone.values():
                metric.update(rows, real)
    found = collection.compute()
    for name, metric in alone.items():
        for key, score in values(metric).items():
            matching = {f"{name}_{key}", key or name} & found.keys()
            assert [found[match].item() for match in matching] == [score], (name, key)


class Identity(nn.Module):
    num_features = WIDTH

    def forward(self, features: Tensor) -> Tensor:
        return features


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance`:UserWarning")
def test_parity_with_torchmetrics() -> None:
    """FID, and KID where its one subset is the whole; it draws from the global generator in a random order."""
    ours: list[Any] = [FrechetDistance(WIDTH), KernelDistance(WIDTH)]
    theirs: list[Any] = [
        FrechetInceptionDistance(Identity()),
        KernelInceptionDistance(Identity(), subsets=1, subset_size=300),
    ]
    for mine, other in zip(ours, theirs, strict=True):
        for real in (False, True):
            mine.update(made_up(int(real), 300), real=real)
            other.update(made_up(int(real), 300), real=real)
    assert ours[0].compute().item() == pytest.approx(theirs[0].compute().item(), rel=1e-6)
    with torch.random.fork_rng(devices=[]):
        mean, _ = theirs[1].compute()
    assert ours[1].compute()["kid_mean"].item() == pytest.approx(mean.item(), rel=1e-6)


def test_nothing_is_drawn_from_the_global_generators(make: Callable[[], FeatureMetric]) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[index]
    metric = make()
    feed(metric)
    values(metric)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # type: ignore[index]


def test_rows_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"features must be \[n, 12\], not \[3, 5\]"):
        KernelDistance(WIDTH).update(torch.zeros(3, 5), real=True)
    with pytest.raises(ValueError, match="2 indices of 3 rows"):
        KernelDistance(WIDTH).update(torch.zeros(3, WIDTH), real=True, indices=torch.arange(2))


def test_one_split_has_a_deviation() -> None:
    """torchmetrics' InceptionScore(splits=1) gives NaN."""
    metric = InceptionScore(3)
    metric.update(torch.tensor([[0.0, 1.0, 2.0]]))
    assert values(metric) == {"is_mean": pytest.approx(1.0), "is_std": 0.0}
    assert not math.isnan(values(metric)["is_std"])
