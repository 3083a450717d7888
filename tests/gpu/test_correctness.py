"""What a GPU computes: it trains, graphs take the steps that they replay, a CPU walks the same trajectory, a run
resumes to the bit, and nothing makes the host wait."""

from __future__ import annotations

import signal
from collections.abc import Callable

import psutil
import pytest
import torch

from pipeline.config import EvaluationConfig
from pipeline.errors import Preempted
from pipeline.evaluation.features import FeatureExtractor
from pipeline.evaluation.features.classifier import MnistFeatures
from pipeline.evaluation.features.published import InceptionFeatures
from pipeline.training.step import build_step
from tests.gpu.walks import Bench, Walk, state_of, take_steps, trainer_of, walk, without_graphs
from tests.jobs import ROOT

pytestmark = [pytest.mark.gpu(seconds=30), pytest.mark.filterwarnings("default")]
CONFIGS = ("wgan", "wgan_notebook", "wgan_gp", "lsgan", "gan", "acgan", "rpgan", "quickstart")
"""Files of configs/; the last one is of the objective crpgan."""
STEPS, STOPS = 4, 2
EXACT = {name: 1e-6 if name in ("wgan_gp", "rpgan") else 1e-9 for name in CONFIGS}
"""Largest difference of losses and states in float64. Adam's captured step counter is float32: 1e-7 of its bias
terms."""
FIRST_LOSSES = 2e-7
"""Largest relative difference of float32's first step from float64's: later ones may differ by more, since RMSprop
turns the rounding of a gradient near zero into a whole step."""
FEATURES = 1e-5
"""By the largest feature: TensorFloat-32 would leave some 5e-4."""
BLOCKS = (500, 1000, 1500)
"""Steps between the evaluations of a training: averages and optimisers have settled after the first."""
MIB = 2**20
Record = Callable[[str, object], None]


def test_it_trains(bench: Bench, record_property: Record) -> None:
    """20 steps one by one, then 200 as a graph."""
    for graph, steps in ((False, 20), (True, 200)):
        with bench.trainer(cuda_graph=graph) as trainer:
            losses = walk(trainer, steps).losses
        record_property(f"losses after {steps} steps", [round(loss, 6) for loss in losses[-1].tolist()])
        assert losses.isfinite().all()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_graph_takes_the_steps_that_it_replays(bench: Bench, name: str, record_property: Record) -> None:
    """Bit for bit the step that was captured, run eagerly; and in float64 a run without graphs."""
    with bench.trainer(name, cuda_graph=True) as trainer:
        captured = walk(trainer, STEPS)
    with bench.trainer(name, cuda_graph=True) as trainer:
        runtime = without_graphs(trainer.runtime)
        trainer.step = build_step(trainer.config, trainer.objective, trainer.state, runtime)
        record_property("float32 difference", difference := captured.difference(walk(trainer, STEPS)))
    assert difference == 0
    walks = []
    for graph in (True, False):
        with bench.trainer(name, precision="float64", cuda_graph=graph) as trainer:
            walks.append(walk(trainer, STEPS))
    record_property("float64 difference", difference := walks[0].difference(walks[1]))
    assert difference <= EXACT[name]


@pytest.mark.gpu(seconds=90)
@pytest.mark.parametrize("name", ["lsgan", "wgan"])
def test_a_cpu_walks_the_same_trajectory(bench: Bench, name: str, record_property: Record) -> None:
    walks = {}
    for device in ("cpu", "cuda"):
        with bench.trainer(name, device=device, precision="float64", cuda_graph=False) as trainer:
            walks[device] = walk(trainer, STEPS)
    record_property("difference", difference := walks["cuda"].difference(walks["cpu"]))
    assert difference <= EXACT[name]
    with bench.trainer(name, precision="float32", cuda_graph=False) as trainer:
        first, exact = walk(trainer, 1).losses[0].double(), walks["cpu"].losses[0]
    record_property("float32 losses", relative := ((first - exact).abs() / exact.abs().max()).max().item())
    assert relative <= FIRST_LOSSES


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "captured"])
def test_a_run_resumes_to_the_bit(bench: Bench, graph: bool) -> None:
    """Stopped by a signal, each time after a step that is saved, against a run without stops."""
    ends = []
    for name, stops in (("whole", 0), ("stopped", STOPS)):
        settings = {"training.steps": STEPS, "runtime.cuda_graph": graph, "run.name": f"{name}-{graph}"}
        config = bench.config("wgan", settings)
        for _ in range(stops):
            with trainer_of(config) as trainer:
                signal.raise_signal(signal.SIGTERM)
                with pytest.raises(Preempted):
                    trainer.run()
        with trainer_of(config) as trainer:
            trainer.run()
            ends.append(Walk(torch.zeros(1), state_of(trainer)))
    assert ends[1].difference(ends[0]) == 0


@pytest.mark.gpu(seconds=20)
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "captured"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_host_never_waits(bench: Bench, name: str, graph: bool) -> None:
    """Steps and their inputs run under torch's own guard against calls that wait for the device."""
    with bench.trainer(name, cuda_graph=graph) as trainer:
        take_steps(trainer, STEPS)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            take_steps(trainer, STEPS)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["mnist", "inception"])
def test_features_are_those_of_the_cpu(name: str, record_property: Record) -> None:
    """With TensorFloat-32 allowed all around: the extractors switch it off. Inception's only where its weights are."""
    weights = InceptionFeatures.weights.path(EvaluationConfig())
    if name == "inception" and not weights.is_file():
        pytest.skip(f"no weights in {weights}")
    images = torch.randint(256, (50, 1, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)

    def features(device: str) -> torch.Tensor:
        place = torch.device(device)
        space: FeatureExtractor = MnistFeatures(place) if name == "mnist" else InceptionFeatures(weights, place)
        return space(images)[0]

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    theirs = features("cpu")
    record_property("difference", difference := ((features("cuda") - theirs).abs().max() / theirs.abs().max()).item())
    assert difference <= FEATURES


def test_fp16_keeps_a_sane_loss_scale(bench: Bench, record_property: Record) -> None:
    """It begins at 2^16, and a growth takes 2,000 updates without an overflow."""
    with bench.trainer(precision="fp16", cuda_graph=False) as trainer:
        losses, scale = walk(trainer, 200).losses, trainer.state.scaler.get_scale()
    record_property("scale", scale)
    assert losses.isfinite().all()
    assert 2**4 <= scale <= 2**18


@pytest.mark.gpu(seconds=120)
def test_memory_is_flat_and_fid_falls(bench: Bench, record_property: Record) -> None:
    """The reference on MNIST, captured; MNIST must be prepared."""
    settings = {"data.dataset": "mnist", "evaluation.every": sum(BLOCKS), "evaluation.num_images": 5000}
    config = bench.config("wgan", settings | {"run.name": "training", "runtime.cuda_graph": True})
    if not (ROOT / config.data.root / "mnist/dataset.json").is_file():
        pytest.skip(f"no mnist in {config.data.root}: prepare it there, or name its place by --data.root")
    fids, device_memory, host_memory = [], [], []
    with trainer_of(config) as trainer:
        for steps in BLOCKS:
            take_steps(trainer, steps)
            assert trainer.scorer is not None
            path = trainer.folder.scores(trainer.state.step)
            scores = trainer.scorer.score_generator(
                trainer.state.copied_generator("ema"), path, {"step": trainer.state.step}
            )
            fids.append(scores["features"]["mnist"]["fid"])
            trainer.log.begin()
            device_memory.append(torch.cuda.memory_allocated())
            host_memory.append(psutil.Process().memory_info().rss)
    for name, values in (("FID", fids), ("device bytes", device_memory), ("host bytes", host_memory)):
        record_property(name, values)
    assert device_memory[-1] - device_memory[1] <= MIB
    assert host_memory[-1] - host_memory[1] <= 64 * MIB
    assert fids == sorted(fids, reverse=True)
