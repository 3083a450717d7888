"""Every setting of a run: its type, default, unit, allowed range and source.

The defaults are the reference notebook's numbers, so a file in `configs/` lists only what differs. `--help` prints the
string below a field.
References: Arjovsky et al. 2017 (arXiv 1701.07875, Algorithm 1); Gulrajani et al. 2017 (arXiv 1704.00028).
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import ge, gt, le, lt
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import UserError

LIMITS = {"low": (ge, "at least"), "above": (gt, "greater than"), "high": (le, "at most"), "below": (lt, "less than")}
"""What may limit a setting's value, or each number of a pair: how it is compared and said."""


def setting(default: Any, *, free: bool = False, **limits: float) -> Any:
    """Declares a setting with its default and the limits of its values: `low`, `above`, `high`, `below` (see LIMITS).

    A `free` setting may differ between two launches of the same run, because it does not alter the trajectory.
    """
    metadata = {"free": free, "limits": limits}
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives and how often it writes."""

    name: str = setting("", free=True)
    """Name of the run's folder; by default the objective's, and the dataset's if it is not mnist: wgan-cifar10."""
    root: str = setting("runs", free=True)
    """Folder that holds the runs."""
    start_from: str | None = setting(None)
    """Run, checkpoint, export or hf://OWNER/NAME with whose weights a new run begins; null: it draws them."""
    log_every: int = setting(50, low=1, free=True)
    """Number of steps between two lines of metrics.jsonl."""
    sample_every: int = setting(500, low=1, free=True)
    """Number of steps between two sample grids (the reference's 500)."""
    checkpoint_every: int = setting(1000, low=1, free=True)
    """Number of steps between two checkpoints."""
    keep_last: int = setting(3, low=1, free=True)
    """How many of the newest checkpoints are kept."""
    keep_every: int | None = setting(None, low=1, free=True)
    """Checkpoints whose step is a multiple of this are kept too; null: only the newest."""
    keep_best: str | None = setting(None, free=True)
    """Score by which the best checkpoint of the run's evaluations is kept too, and exported at the end: fid (of the
    first feature space), mnist.fid, kid_mean, is_mean, precision, ... Every evaluated step is saved then. null: no."""
    patience: int | None = setting(None, low=1, free=True)
    """Number of evaluations without a better score of run.keep_best after which the run ends; null: it never does."""
    max_save_failures: int = setting(3, low=0, free=True)
    """Number of consecutive failed saves (full disk, lost folder) that the run tolerates before it stops."""
    trackers: list[str] = setting(["tensorboard"], free=True)
    """Accelerate trackers to log to, by name: tensorboard, wandb, trackio, mlflow, ..."""
    project: str = setting("gan-pipeline", free=True)
    """Project (experiment) in trackers that have projects; the run is called run.name there."""
    tracker_options: dict[str, dict[str, object]] = setting({}, free=True)
    """Arguments of trackers' starts, accelerate's init_kwargs: {wandb: {entity: NAME, group: NAME}}."""
    profile: str | None = setting(None, free=True)
    """FROM:TO, the first and the last step that torch's profiler traces into the run's profile/; null: none."""

    @property
    def profiled_steps(self) -> tuple[int, int] | None:
        """The first and the last step of `profile`."""
        match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", self.profile or "", re.ASCII)
        return (int(match[1]), int(match[2])) if match else None


@dataclass(frozen=True)
class DataConfig:
    """The real images."""

    dataset: str = setting("mnist")
    """mnist, fashion_mnist, cifar10, stacked_mnist (fetched when missing), or what `gan-pipeline prepare` made: its
    folder, or its name under data.root."""
    root: str = setting("data", free=True)
    """Folder that holds the datasets that are given by name."""
    source: Literal["auto", "resident", "streaming"] = setting("auto")
    """resident: images are decoded once into device memory. streaming: they are read all along. auto: as they fit."""
    resident_limit_mib: int = setting(4096, low=1)
    """Size in MiB of the largest decoded split that auto keeps resident."""
    lanes: int = setting(8, low=1)
    """Number of independent streams that make up a streamed batch. It divides the batch size, and world size x
    max(workers, 1) divides it."""
    workers: int = setting(1, low=0, high=256, free=True)
    """Number of processes per rank that read ahead for the streaming source; 0: the rank reads by itself."""
    horizontal_flip: bool = setting(False)
    """Whether each real image of training is flipped left to right with probability 1/2: not for digits or letters."""
    allow_shell_urls: bool = setting(False, free=True)
    """Whether URLs of shards may run shell commands (pipe:, and other schemes of webdataset that start a process)."""


@dataclass(frozen=True)
class NetworkConfig:
    """The two networks."""

    latent_dim: int = setting(100, low=1, high=2**20)
    """Length of a latent; its entries are uniform in [-1, 1]."""
    width: float = setting(1.0, above=0.0, high=100.0)
    """Factor on every hidden channel count (1.0: the reference's networks)."""
    generator: str | None = setting(None)
    """module:NAME of a generator of your own (interface: pipeline/models/user_networks.py); null: the reference's."""
    critic: str | None = setting(None)
    """module:NAME of a critic of your own; null: the reference's."""
    options: dict[str, Any] = setting({})
    """Settings of your own networks, under any keys; they find them in network.options."""


@dataclass(frozen=True)
class OptimizerConfig:
    """One optimiser."""

    algorithm: Literal["rmsprop", "adam"] = setting("rmsprop")
    """Update rule."""
    learning_rate: float = setting(5e-5, above=0.0, high=1e30)
    """Step size at step 0."""
    decay: float = setting(0.0, low=0.0)
    """Inverse-time decay: update u takes learning_rate / (1 + decay * u)."""
    warm_up: int = setting(0, low=0)
    """Number w of updates over which the rate is multiplied by min(1, (u + 1) / w) (Goyal et al. 2017, 1706.02677)."""
    annealing: Literal["linear", "cosine"] | None = setting(None)
    """Shape of a factor that falls from 1 to annealing_floor over annealing_updates: a straight line, or half a cosine
    (Loshchilov & Hutter 2017, 1608.03983, eq. 5); null: none."""
    annealing_updates: int = setting(40_000, low=1)
    """Number of updates of this optimiser that annealing takes: the critic makes n_critic a step, more in a burn-in."""
    annealing_floor: float = setting(0.0, low=0.0, high=1.0)
    """Last value of annealing's factor."""
    rho: float = setting(0.9, low=0.0, high=1.0)
    """Decay of RMSprop's average of squared gradients (Keras's 0.9; torch's default is 0.99)."""
    betas: tuple[float, float] = setting((0.0, 0.9), low=0.0, below=1.0)
    """Decay rates of Adam's two moments."""
    final_beta2: float | None = setting(None, low=0.0, below=1.0)
    """Where the second of them goes to from betas, along half a cosine of annealing_updates (0.9 to 0.99 in the code of
    Huang et al. 2024, 2501.05441); null: it stays."""
    epsilon: float = setting(1e-7, above=0.0)
    """Term added to the denominator (Keras's 1e-7; torch's default is 1e-8). RMSprop divides by sqrt(v) + epsilon, as
    torch and Keras up to 2.3.1 do; since 2.11 Keras divides by sqrt(v + epsilon), which makes much smaller steps."""


@dataclass(frozen=True)
class TrainingConfig:
    """The algorithm. A step is one generator update after n_critic critic iterations, or a burn-in's."""

    objective: str = setting("wgan")
    """wgan, wgan_gp, lsgan, gan, rpgan (images in pairs); with classes crpgan (pairs of one class), acgan and acwgan;
    module:NAME of your own."""
    steps: int = setting(40_000, low=1, free=True)
    """Number of generator updates."""
    seed: int = setting(0, low=0)
    """Seed of all random numbers of the run."""
    batch_size: int = setting(64, low=1, high=2**20)
    """Number of real images in a critic batch, shared evenly among all processes."""
    n_critic: int = setting(5, low=1, high=10_000)
    """Critic iterations a step."""
    burn_in_n_critic: int | None = setting(None, low=1, high=10_000)
    """n_critic in a burn-in's steps (100 in the code of Arjovsky et al. 2017); null: no burn-in."""
    burn_in_steps: int = setting(25, low=0)
    """Number of steps at the beginning of a run that are burn-in (25 in that code)."""
    burn_in_every: int | None = setting(500, low=1)
    """Later steps, counted from 0, that are multiples of this are burn-in too (500 in that code); null: none."""
    clip_value: float | None = setting(0.01, above=0.0)
    """Every critic parameter is clipped to [-clip_value, clip_value] after its update; null: no clipping."""
    spectral_norm: bool = setting(False)
    """Whether each weight of the critic is divided by its spectral norm, after any clipping (Miyato et al. 2018,
    1802.05957, Algorithm 1). It goes with any objective; wgan may then have clip_value null."""
    gradient_penalty: float | None = setting(None, above=0.0)
    """Weight of the gradient penalty (WGAN-GP's 10); null: none."""
    r1_penalty: float | None = setting(None, above=0.0)
    """Twice the weight of the critic's squared slope at real images (gamma of Mescheder et al. 2018, 1801.04406, eq. 9:
    10 there). It goes with any objective; null: none."""
    r2_penalty: float | None = setting(None, above=0.0)
    """The same at fake images (R2 there; with R1 in Huang et al. 2024, 2501.05441)."""
    penalty_annealing: int | None = setting(None, low=1)
    """Number of steps over which the weights of all penalties fall along half a cosine to penalty_floor of what they
    were, and then stay (gamma in the code of Huang et al. 2024); null: they do not fall."""
    penalty_floor: float = setting(0.1, low=0.0, high=1.0)
    """Last share of the penalties' weights with penalty_annealing (0.1 in that code)."""
    critic_updates: Literal["joint", "separate"] = setting("joint")
    """joint: one update on the sum of both losses (Algorithm 1). separate: one on each in turn (the notebook)."""
    critic_fakes: Literal["batch", "moving"] = setting("batch")
    """Batch-norm statistics with which the generator makes images for the critic: the batch's, or the moving averages
    (inference mode, as in the notebook)."""
    diff_augment: list[Literal["color", "translation", "cutout"]] = setting([])
    """Changes of real and fake images before the critic sees them, in both updates, for small datasets (DiffAugment,
    Zhao et al. 2020, 2006.10738, section 3); []: none."""
    critic_optimizer: OptimizerConfig = setting(OptimizerConfig())
    """Optimiser of the critic."""
    generator_optimizer: OptimizerConfig = setting(OptimizerConfig())
    """Optimiser of the generator."""
    ema_decay: float = setting(0.999, low=0.0, high=1.0)
    """Decay per step of the generator's exponential moving average; at step t it is at most (1 + t) / (10 + t)."""
    ema_half_life: float | None = setting(None, above=0.0)
    """Number of images (batch_size a step) over which half of the moving average is renewed, in place of ema_decay; at
    most 0.05 of the images so far (Karras et al. 2020, 2006.06676: ema_kimg and ema_rampup of its code)."""

    def critic_iterations(self, first: int, stop: int) -> int:
        """Returns the number of critic iterations in steps first, ..., stop - 1 together, counted from 0."""
        if self.burn_in_n_critic is None:
            return (stop - first) * self.n_critic

        def burn_in_before(step: int) -> int:
            early, every = min(step, self.burn_in_steps), self.burn_in_every
            # The multiples of `every` from `early` to `step`: there are ceil(n / every) below n.
            return early + (-(-step // every) - -(-early // every) if every else 0)

        burn_in = burn_in_before(stop) - burn_in_before(first)
        return (stop - first) * self.n_critic + burn_in * (self.burn_in_n_critic - self.n_critic)


@dataclass(frozen=True)
class EvaluationConfig:
    """Scores of generated images."""

    every: int | None = setting(5000, low=1, free=True)
    """Number of steps between two evaluations; the last step has one too. null: no evaluation."""
    num_images: int = setting(10_000, low=2, free=True)
    """Number of generated images to score."""
    batch_size: int = setting(200, low=1, free=True)
    """Number of images per forward pass; it does not change a score."""
    features: list[str] = setting(["mnist"], free=True)
    """Feature spaces: mnist (digits, stacked too), own (made by `gan-pipeline train-classifier`), inception, dinov2
    (needs timm), module:NAME of your own."""
    reference: Literal["train", "test"] = setting("train", free=True)
    """Real split that images are compared with; the other split gives the floor."""
    neighbours: int = setting(5, low=1, high=100, free=True)
    """The k of precision, recall, density and coverage: 5 in Naeem et al. 2020 (2002.09797), 3 in many other papers."""
    gan_train: bool = setting(False, free=True)
    """Whether a classifier is also trained on at most 10,000 generated images and tested on real ones (GAN-train of
    Shmelkov et al. 2018, 1807.09499); for generators with classes."""
    inception_weights: str | None = setting(None, free=True)
    """Path of torch-fidelity's weight file of Inception v3; null: the file that torch-fidelity downloads."""
    reference_statistics: str | None = setting(None, free=True)
    """Path of published statistics of real images in inception's features, an .npz file with mu and sigma: images get
    the score fid_published against them."""
    dinov2_weights: str | None = setting(None, free=True)
    """Path of the weight file of DINOv2's ViT-L/14; null: the file that its authors offer is downloaded."""
    weights: Literal["ema", "raw"] = setting("ema", free=True)
    """Which generator is scored: ema its moving average, raw the trained weights."""


@dataclass(frozen=True)
class RuntimeConfig:
    """Processes and hardware."""

    device: Literal["auto", "cpu", "cuda"] = setting("auto", free=True)
    """auto: CUDA where it is available, unless accelerate's configuration says use_cpu."""
    precision: Literal["float32", "tf32", "float64", "bf16", "fp16"] = setting("float32")
    """Arithmetic of convolutions and matrix products, over float32 weights: tf32 (on CUDA; elsewhere float32), bf16,
    fp16 (on CUDA, with loss scaling). float64: weights and all arithmetic, for tests of exactness."""
    accumulation: int = setting(1, low=1, free=True)
    """Number of micro-batches into which a rank divides its share of a batch to save memory; the trajectory is the same
    to rounding, the generator's update about three times as long."""
    cuda_graph: bool | None = setting(None, free=True)
    """Whether a step is captured once as a CUDA graph and replayed (not with fp16); null: wherever that is possible."""
    compress_gradients: bool = setting(False)
    """Has no effect: older configuration files hold false, and true is refused."""
    threads: int | None = setting(None, low=1, high=1024, free=True)
    """Number of threads of a rank on a CPU; null: the cores of the machine are shared among its ranks."""
    timeout_seconds: int = setting(600, low=1, high=1_000_000, free=True)
    """Longest wait in seconds for another rank, when the ranks meet and later, before a rank gives up."""


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
        """Raises UserError for values out of range and settings that contradict each other."""
        for section in dataclasses.fields(self):
            if not isinstance(value := getattr(self, section.name), type(section.default)):
                name = type(section.default).__name__
                raise UserError(f"{section.name} is {value!r}: give a {name}, or its keys to configure()")
        for key, value, item in leaves(self):
            _check_range(key, value, item)
        training, network = self.training, self.network
        if not self.run.name:
            object.__setattr__(self, "run", dataclasses.replace(self.run, name=self._default_name()))
        if self.runtime.compress_gradients:
            raise UserError("runtime.compress_gradients is true: gradients are sent as they are now, set it to false")
        if not re.fullmatch(r"[\w][\w.-]*", self.run.name):
            raise UserError(f"run.name is {self.run.name!r}: use letters, digits, '.', '_' and '-', below run.root")
        if json.loads(json.dumps(network.options, default=str)) != network.options:
            raise UserError(f"network.options is {network.options}: files keep what JSON has, and nothing else")
        if network.options and network.generator is None and network.critic is None:
            raise UserError("network.options are for networks of your own: name one, or leave them out")
        if not self.evaluation.features:
            raise UserError("evaluation.features is empty: name one, or set evaluation.every to null for no scores")
        first, last = self.run.profiled_steps or (0, 0)
        if self.run.profile is not None and not 1 <= first <= last <= training.steps:
            steps = f"two steps from 1 to {training.steps} (training.steps) in order"
            raise UserError(f"run.profile is {self.run.profile!r}: give FROM:TO, {steps}")
        for name in ("critic_optimizer", "generator_optimizer"):
            optimizer: OptimizerConfig = getattr(training, name)
            if optimizer.final_beta2 is not None and optimizer.algorithm != "adam":
                raise UserError(f"training.{name}.final_beta2 is {optimizer.final_beta2}: it is Adam's, set it to null")
        if self.data.source == "streaming" and training.batch_size % self.data.lanes:
            lanes = f"data.lanes {self.data.lanes} does not divide training.batch_size {training.batch_size}"
            raise UserError(f"{lanes}: choose a divisor of the batch size")

    def _default_name(self) -> str:
        """Returns the name of a run that was given none: the objective's and, but for mnist, the dataset's."""
        dataset = Path(self.data.dataset).absolute().name
        names = self.training.objective.rpartition(":")[2], "" if dataset == "mnist" else dataset
        return re.sub(r"[^\w.-]+", "-", "-".join(filter(None, names))) or "gan"

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.run.root) / self.run.name


def leaves(section: Any, prefix: str = "") -> Iterator[tuple[str, Any, dataclasses.Field[Any]]]:
    """Yields dotted key, value and field of every setting of a section and of the sections within it."""
    for item in dataclasses.fields(section):
        value = getattr(section, item.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, value, item


def _check_range(key: str, value: Any, item: dataclasses.Field[Any]) -> None:
    if value is None and "None" not in str(item.type):
        raise UserError(f"{key} is null: it needs a value")
    for name, limit in item.metadata["limits"].items():
        holds, words = LIMITS[name]
        for number in value if isinstance(value, tuple | list) else () if value is None else (value,):
            if not holds(number, limit):  # not(...), since NaN compares false with everything
                raise UserError(f"{key} is {value}: it must be {words} {limit}")


def flatten(config: Config, *, free: bool = True) -> dict[str, Any]:
    """Returns all settings by dotted key; with `free=False` without those that may change between launches."""
    return {key: value for key, value, item in leaves(config) if free or not item.metadata["free"]}
