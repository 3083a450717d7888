"""Every setting of a run: its type, default, unit, allowed range and source.

The defaults are the reference notebook's numbers, so a file in `configs/` lists only what differs.
References: Arjovsky et al. 2017 (arXiv 1701.07875, Algorithm 1); Gulrajani et al. 2017 (arXiv 1704.00028).
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import UserError


def knob(
    default: Any,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    free: bool = False,
) -> Any:
    """A setting with its allowed range: `low <= value`, `above < value`, `value <= high`.

    `free` marks what may change between two launches of the same run, since it does not alter the trajectory.
    """
    metadata = {"low": low, "above": above, "high": high, "free": free}
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives and how often it writes."""

    name: str = knob("wgan", free=True)
    """Name of the run's folder under `run.root`."""
    root: str = knob("runs", free=True)
    """Folder that holds the runs."""
    log_every: int = knob(50, low=1, free=True)
    """Steps between two lines of metrics.jsonl."""
    sample_every: int = knob(500, low=1, free=True)
    """Steps between two sample grids (the reference's 500)."""
    checkpoint_every: int = knob(1000, low=1, free=True)
    """Steps between two checkpoints."""
    keep_last: int = knob(3, low=1, free=True)
    """Newest checkpoints to keep."""
    keep_every: int | None = knob(None, low=1, free=True)
    """Also keep every checkpoint whose step is a multiple of this."""
    keep_best: str | None = knob(None, free=True)
    """Also keep, and export at the end, the checkpoint with the best of this score in the run's evaluations, each of
    which is then saved: fid (of the first feature space), mnist.fid, kid_mean, is_mean, precision, ...; null: none."""
    patience: int | None = knob(None, low=1, free=True)
    """Evaluations without a better score of run.keep_best after which the run ends; null: it trains all its steps."""
    max_save_failures: int = knob(3, low=0, free=True)
    """Consecutive failed saves (full disk, lost folder) that the run tolerates before it stops."""
    trackers: list[str] = knob(["tensorboard"], free=True)
    """Accelerate trackers to log to, by name: tensorboard, wandb, trackio, mlflow, ..."""
    project: str = knob("gan-pipeline", free=True)
    """Project (experiment) of the trackers that have such; in it this is the run `run.name`."""
    tracker_options: dict[str, dict[str, Any]] = knob({}, free=True)
    """More arguments of a tracker's start, what accelerate calls init_kwargs: {wandb: {entity: NAME, group: NAME}}."""
    profile: str | None = knob(None, free=True)
    """FROM:TO, steps to trace with torch's profiler, both included, each rank into a file of the run's folder profile/;
    null: none."""

    @property
    def profiled_steps(self) -> tuple[int, int] | None:
        """The first and the last step of `profile`."""
        if self.profile is None:
            return None
        first, _, last = self.profile.partition(":")
        return int(first), int(last)


@dataclass(frozen=True)
class DataConfig:
    """The real images."""

    dataset: str = knob("mnist")
    """A known dataset (mnist, fashion_mnist, cifar10), prepared on first use, or the path of a folder that holds a
    dataset.json."""
    root: str = knob("data", free=True)
    """Folder under which known datasets are prepared."""
    source: Literal["auto", "resident", "streaming"] = knob("auto")
    """resident: decoded once into device memory. streaming: read through webdataset. auto: resident if it fits."""
    resident_limit_mib: int = knob(4096, low=1)
    """Largest decoded split, in MiB, that `auto` keeps resident."""
    lanes: int = knob(8, low=1)
    """Independent streams that make up a streamed batch; world size x max(workers, 1) divides it, it divides the
    batch size. Part of the trajectory."""
    workers: int = knob(1, low=0, high=256, free=True)
    """Processes per rank that read ahead for the streaming source; 0: the rank reads by itself."""
    horizontal_flip: bool = knob(False)
    """Flip each real image that training sees left to right at even odds: not for digits or letters."""
    allow_shell_urls: bool = knob(False, free=True)
    """Let shard URLs run shell commands (pipe:, and webdataset's other schemes that start a process)."""


@dataclass(frozen=True)
class NetworkConfig:
    """The two networks."""

    latent_dim: int = knob(100, low=1, high=2**20)
    """Length of a latent; its entries are uniform in [-1, 1]."""
    width: float = knob(1.0, above=0.0, high=100.0)
    """Multiplier of every hidden channel count (1.0: the reference's networks)."""
    generator: str | None = knob(None)
    """module:NAME of a generator of your own (pipeline/models/user_networks.py); null: the reference's."""
    critic: str | None = knob(None)
    """module:NAME of a critic of your own; null: the reference's."""
    options: dict[str, Any] = knob({})
    """What your networks take beside: any keys."""


@dataclass(frozen=True)
class OptimizerConfig:
    """One optimiser."""

    algorithm: Literal["rmsprop", "adam"] = knob("rmsprop")
    """Update rule."""
    learning_rate: float = knob(5e-5, above=0.0, high=1e30)
    """Step size at step 0."""
    decay: float = knob(0.0, low=0.0)
    """Inverse-time decay per update u: learning_rate / (1 + decay * u)."""
    warm_up: int = knob(0, low=0)
    """Updates w over which the rate rises: a factor of min(1, (u + 1) / w) (Goyal et al. 2017, 1706.02677, 2.2)."""
    annealing: Literal["linear", "cosine"] | None = knob(None)
    """A factor that falls from 1 to annealing_floor over annealing_updates and stays there: along a straight line or
    half a cosine (Loshchilov & Hutter 2017, 1608.03983, eq. 5); null: none."""
    annealing_updates: int = knob(40_000, low=1)
    """Of this optimiser: n_critic times as many for the critic, and those of a burn-in."""
    annealing_floor: float = knob(0.0, low=0.0, high=1.0)
    """Last value of the factor."""
    rho: float = knob(0.9, low=0.0, high=1.0)
    """RMSprop's decay of the squared-gradient average (Keras's 0.9, torch's default is 0.99)."""
    betas: tuple[float, float] = knob((0.0, 0.9))
    """Adam's decay rates of the two moments."""
    epsilon: float = knob(1e-7, above=0.0)
    """Term added to the denominator (Keras's 1e-7, torch's default is 1e-8). RMSprop divides by sqrt(v) + epsilon, as
    torch and Keras up to 2.3.1 do, with which the notebook ran. Keras has divided by sqrt(v + epsilon) since 2.11: as
    long as gradients are below sqrt(epsilon), 3e-4, its steps are much smaller."""


@dataclass(frozen=True)
class TrainingConfig:
    """The algorithm. A step is one generator update after n_critic critic iterations, or a burn-in's."""

    objective: str = knob("wgan")
    """wgan, wgan_gp, lsgan, gan, acgan, acwgan (wgan with acgan's classes), or module:NAME of an Objective of yours
    (pipeline/models/objectives.py)."""
    steps: int = knob(40_000, low=1, free=True)
    """Generator updates to train for."""
    seed: int = knob(0, low=0)
    """Every random number of the run is a function of this seed, its purpose and the step."""
    batch_size: int = knob(64, low=1, high=2**20)
    """Real images of a critic batch over all ranks together; the world size divides it."""
    n_critic: int = knob(5, low=1, high=10_000)
    """Critic iterations a step."""
    burn_in_n_critic: int | None = knob(None, low=1, high=10_000)
    """Critic iterations, in the place of n_critic, of the steps of a burn-in; null: none. The code of Arjovsky et al.
    2017 (WassersteinGAN, main.py: Diters) takes 100."""
    burn_in_steps: int = knob(25, low=0)
    """First steps of a run that are burn-in (that code's 25)."""
    burn_in_every: int | None = knob(500, low=1)
    """Later steps that are burn-in too: those, counted from 0, that this divides (that code's 500); null: none."""
    clip_value: float | None = knob(0.01, above=0.0)
    """Every critic parameter is clipped to [-clip_value, clip_value] after its update; null: no clipping."""
    spectral_norm: bool = knob(False)
    """Divide each weight of the critic by its spectral norm (Miyato et al. 2018, 1802.05957, Algorithm 1), with any
    objective. It bounds the critic's slope as clipping does: with it wgan may have clip_value null. With both, the clip
    is of the weights before the division, which undoes their scale, and of the biases."""
    gradient_penalty: float | None = knob(None, above=0.0)
    """Weight of the gradient penalty (WGAN-GP's 10); null: none."""
    r1_penalty: float | None = knob(None, above=0.0)
    """Twice the weight of the critic's squared slope at real images (Mescheder et al. 2018, 1801.04406, eq. 9: gamma,
    10 there); with any objective; null: none."""
    critic_updates: Literal["joint", "separate"] = knob("joint")
    """joint: one update on the sum of the real and fake losses (Algorithm 1). separate: one on each in turn
    (the notebook)."""
    critic_fakes: Literal["batch", "moving"] = knob("batch")
    """Batch-norm statistics of the generator while it makes images for the critic: those of the batch, or the moving
    averages (inference mode, the notebook's way)."""
    diff_augment: list[Literal["color", "translation", "cutout"]] = knob([])
    """What happens to real and fake images before the critic sees them, in both updates, for small datasets
    (DiffAugment, Zhao et al. 2020, 2006.10738, section 3); []: nothing."""
    critic_optimizer: OptimizerConfig = knob(OptimizerConfig())
    """Optimiser of the critic."""
    generator_optimizer: OptimizerConfig = knob(OptimizerConfig())
    """Optimiser of the generator."""
    ema_decay: float = knob(0.999, low=0.0, high=1.0)
    """Decay per step of the generator's exponential moving average; its warm-up is (1 + t) / (10 + t)."""
    ema_half_life: float | None = knob(None, above=0.0)
    """In the place of ema_decay: images, batch_size a step, over which half of the moving average is renewed; in its
    warm-up at most 0.05 of the images so far (Karras et al. 2020, 2006.06676: ema_kimg and ema_rampup of its code)."""

    def critic_iterations(self, first: int, stop: int) -> int:
        """Of the steps first, ..., stop - 1 together, counted from 0."""

        def before(step: int) -> int:
            if self.burn_in_n_critic is None:
                return step * self.n_critic
            burn_in = min(step, self.burn_in_steps)
            if (every := self.burn_in_every) is not None:
                again = -(-self.burn_in_steps // every) * every  # the first of these that is not one of the first steps
                burn_in += len(range(again, step, every))
            return step * self.n_critic + burn_in * (self.burn_in_n_critic - self.n_critic)

        return before(stop) - before(first)


@dataclass(frozen=True)
class EvaluationConfig:
    """Scores of generated images."""

    every: int | None = knob(5000, low=1, free=True)
    """Steps between two evaluations while training; the last step is always evaluated. null: not at all."""
    num_images: int = knob(10_000, low=2, free=True)
    """Generated images to score."""
    batch_size: int = knob(200, low=1, free=True)
    """Images per forward pass; does not change a score."""
    features: list[str] = knob(["mnist"], free=True)
    """Feature spaces to score in: mnist (digits alone); own (a classifier of the dataset's classes, which
    python -m pipeline.evaluation.train_classifier makes); inception; dinov2 (takes timm); module:NAME of yours
    (pipeline/evaluation/features/custom.py)."""
    reference: Literal["train", "test"] = knob("train", free=True)
    """Real split that images are compared with; the other one gives the floor."""
    neighbours: int = knob(5, low=1, high=100, free=True)
    """The k of precision and recall, density and coverage: 5 as in Naeem et al. 2020 (2002.09797), where
    Kynkaanniemi et al. 2019 (1904.06991) and many papers since take 3."""
    gan_train: bool = knob(False, free=True)
    """Also train a classifier on the images of a generator with classes and test it on real ones (GAN-train of Shmelkov
    et al. 2018, 1807.09499), five epochs on at most 10,000 of them."""
    inception_weights: str | None = knob(None, free=True)
    """Path of torch-fidelity's Inception v3 weight file; null: its own download."""
    dinov2_weights: str | None = knob(None, free=True)
    """Path of DINOv2's ViT-L/14 weight file; null: its authors' download."""
    weights: Literal["ema", "raw"] = knob("ema", free=True)
    """Which generator is scored: its moving average or the trained one."""


@dataclass(frozen=True)
class RuntimeConfig:
    """Processes and hardware."""

    device: Literal["auto", "cpu", "cuda"] = knob("auto", free=True)
    """auto: CUDA where it is available, unless accelerate's configuration says use_cpu."""
    precision: Literal["float32", "tf32", "float64", "bf16", "fp16"] = knob("float32")
    """Arithmetic of convolutions and matrix products, over float32 weights: tf32 (CUDA; elsewhere float32), bf16, fp16
    (CUDA; with loss scaling). float64 is all of it, for tests of exactness."""
    accumulation: int = knob(1, low=1, free=True)
    """Parts in which a rank takes its slice of a batch one after the other, so that memory holds one part; the same
    trajectory to rounding. The generator's update costs about three times as much in parts."""
    cuda_graph: bool | None = knob(None, free=True)
    """Capture a step once and replay it; CUDA only, not with fp16. null: wherever that is possible."""
    compress_gradients: bool = knob(False)
    """Gone; configurations of before hold `false`."""
    threads: int | None = knob(None, low=1, high=1024, free=True)
    """Threads of one rank on a CPU; null: this machine's cores shared among its ranks."""
    timeout_seconds: int = knob(600, low=1, high=1_000_000, free=True)
    """Longest wait for another rank, as the ranks meet and later, before a rank gives up."""


@dataclass(frozen=True)
class Config:
    """A GAN training run."""

    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    network: NetworkConfig = NetworkConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    runtime: RuntimeConfig = RuntimeConfig()

    def __post_init__(self) -> None:
        for key, value, knob_field in leaves(self):
            if value is None and "None" not in str(knob_field.type):
                raise UserError(f"{key} is null: it needs a value")
            _check_range(key, value, knob_field)
        if self.runtime.compress_gradients:
            raise UserError("runtime.compress_gradients is true: gradients are sent as they are now, set it to false")
        if not re.fullmatch(r"[\w][\w.-]*", self.run.name):
            raise UserError(
                f"run.name is {self.run.name!r}: use letters, digits, '.', '_' and '-'; the folder above it is run.root"
            )
        if self.network.options != _kept(self.network.options):
            raise UserError(
                f"network.options is {self.network.options}: files keep mappings from text, lists, text, numbers, "
                "true, false and null, and nothing else"
            )
        if self.network.options and self.network.generator is None and self.network.critic is None:
            raise UserError(
                f"network.options is {self.network.options}, which are for networks of your own: name one, or leave "
                "them out"
            )
        if not self.evaluation.features:
            raise UserError("evaluation.features is empty: name one, or set evaluation.every to null for no scores")
        if self.run.profile is not None:
            steps = self.run.profiled_steps if re.fullmatch(r"\d{1,9}:\d{1,9}", self.run.profile, re.ASCII) else None
            if steps is None or not 1 <= steps[0] <= steps[1] <= self.training.steps:
                raise UserError(
                    f"run.profile is {self.run.profile!r}: give FROM:TO, two steps from 1 to {self.training.steps} "
                    "(training.steps) in order"
                )
        for name in ("critic_optimizer", "generator_optimizer"):
            betas = getattr(self.training, name).betas
            if not all(0 <= beta < 1 for beta in betas):
                raise UserError(f"training.{name}.betas is {betas}: both must lie in [0, 1)")
        if self.data.source == "streaming" and self.training.batch_size % self.data.lanes:
            raise UserError(
                f"data.lanes {self.data.lanes} does not divide training.batch_size {self.training.batch_size}: "
                "choose a divisor of the batch size"
            )

    @property
    def folder(self) -> Path:
        return Path(self.run.root) / self.run.name


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, dataclasses.Field[Any]]]:
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, value, item


def _check_range(key: str, value: Any, item: dataclasses.Field[Any]) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    low, above, high = (item.metadata.get(name) for name in ("low", "above", "high"))
    if low is not None and not value >= low:
        raise UserError(f"{key} is {value}: it must be at least {low}")
    if above is not None and not value > above:
        raise UserError(f"{key} is {value}: it must be greater than {above}")
    if high is not None and not value <= high:
        raise UserError(f"{key} is {value}: it must be at most {high}")


def _kept(options: dict[str, Any]) -> Any:
    """What comes back out of a file, or None."""
    try:
        return json.loads(json.dumps(options))
    except (TypeError, ValueError):
        return None


def check_device(config: RuntimeConfig, has_cuda: bool) -> None:
    """Raises UserError where the runtime's settings ask for a CUDA device that is not there or can't do it."""
    if config.device == "cuda" and not has_cuda:
        raise UserError("runtime.device is cuda, but torch sees no CUDA device: use cpu or auto")
    on_cpu = config.device == "cpu" or not has_cuda
    if config.precision == "fp16" and on_cpu:
        raise UserError("runtime.precision is fp16, which takes a CUDA device: use bf16 or float32")
    if config.cuda_graph and (on_cpu or config.precision == "fp16"):
        raise UserError("runtime.cuda_graph is true, which takes a CUDA device and another precision than fp16")


def captures_steps(config: RuntimeConfig, has_cuda: bool) -> bool:
    """Whether a step is captured as a CUDA graph. fp16's loss scaling looks at gradients on the host."""
    on_cpu = config.device == "cpu" or not has_cuda
    return not on_cpu and config.precision != "fp16" and config.cuda_graph is not False


def flatten(config: Config, *, free: bool = True) -> dict[str, Any]:
    """Dotted key -> value; without the keys that may change between launches when `free` is false."""
    return {key: value for key, value, item in leaves(config) if free or not item.metadata.get("free")}
