"""Networks of the user's own (`network.generator`, `network.critic`): how they are built, and tried before a run, as
losses of the user's own are.

The NAME of `module:NAME` is called as the reference's classes are, with the network's settings, the images' shape
(C, H, W) and the number of classes (0: none), and returns a torch.nn.Module:

    generator: latents (n, latent_dim) in [-1, 1], labels int64 (n,) or None -> images (n, C, H, W), pixels in [0, 1]
    critic: such images -> scores (n,) and, with classes, logits (n, num_classes), else None

These networks see images the right way round, as the wrappers below mirror them for the rest of the pipeline (see
`networks.py`). What is done to the reference's layers is not done to theirs. torch's layers draw their weights, from a
seed of the run. They must run on a CPU too, where they are tried first and where exports are drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import Config, NetworkConfig, import_object
from pipeline.errors import UserError, describe_error
from pipeline.models.networks import AnyGenerator, ImageShape, build_critic, build_generator, dtype_of
from pipeline.models.objectives import AnyObjective, penalises

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
"""The batch norms that `distributed/batch_norm.py` can replace by ones over all ranks."""
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
TRIAL_IMAGES = 4


class UserGenerator(AnyGenerator):
    """The network that `network.generator` names, as the pipeline takes it: it returns mirrored images."""

    def __init__(
        self, config: NetworkConfig, image_shape: ImageShape, num_classes: int, rng: torch.Generator | None
    ) -> None:
        super().__init__(config, image_shape, num_classes)
        self.network = _make("generator", config, image_shape, num_classes, rng)

    def spec(self) -> dict[str, Any]:
        spec = super().spec()
        spec["network"] |= {"generator": self.config.generator, "options": self.config.options}
        return spec

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        images: Tensor = self.network(latents, labels if self.num_classes else None)
        return images.flip(2, 3)


class UserCritic(nn.Module):
    """The network that `network.critic` names, as the pipeline takes it: mirrored images -> scores and logits."""

    def __init__(
        self, config: NetworkConfig, image_shape: ImageShape, num_classes: int, rng: torch.Generator | None
    ) -> None:
        super().__init__()
        self.network = _make("critic", config, image_shape, num_classes, rng)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        outputs = self.network(images.flip(2, 3))
        if not isinstance(outputs, tuple | list) or len(outputs) != 2:
            raise TypeError("it must return two things: scores (n,), and logits (n, num_classes), None without classes")
        scores, logits = outputs
        return scores, logits


def _make(
    role: str, config: NetworkConfig, image_shape: ImageShape, num_classes: int, rng: torch.Generator | None
) -> nn.Module:
    """Calls the user's code. The caller preserves the global random numbers."""
    key, name = f"network.{role}", getattr(config, role)
    make_network = import_object(key, name)
    if rng is not None:
        torch.default_generator.manual_seed(rng.initial_seed())
    try:
        network = make_network(config, image_shape, num_classes)
    except Exception as error:  # the user's code may raise anything
        raise UserError(f"{key}: {name} could not be made ({describe_error(error)})") from error
    if not isinstance(network, nn.Module):
        raise UserError(f"{key} is {name!r}: that makes a {type(network).__name__}, not a torch.nn.Module")
    return network


# -- before a run ------------------------------------------------------------------------------------------------------


def check_user_networks(config: Config, image_shape: ImageShape, num_classes: int) -> None:
    """Tries the user's own networks, if there are any, on a few images on the CPU. Raises UserError if one does not do
    what the head of this file says, or can't be trained with these settings."""
    network, dtype, accumulation = config.network, dtype_of(config), config.runtime.accumulation
    arguments, shape = (network, image_shape, num_classes, torch.Generator()), (TRIAL_IMAGES, *image_shape)
    if network.generator is not None:
        key, generator = "network.generator", build_generator(*arguments).to(dtype)
        if accumulation > 1:
            raise UserError(
                f"runtime.accumulation is {accumulation}: {key}, a network of your own, can't be taken in parts: set "
                "it to 1"
            )
        _check_norms(key, generator)
        latents = torch.linspace(-1, 1, TRIAL_IMAGES * network.latent_dim, dtype=dtype).view(TRIAL_IMAGES, -1)
        images = _call(key, generator, latents, torch.arange(TRIAL_IMAGES) % max(num_classes, 1))
        _check_shape(key, "images", images, shape)
        low, high = images.min().item(), images.max().item()
        if not 0 <= low <= high <= 1:
            raise UserError(f"{key} makes pixels from {low:.3g} to {high:.3g}: end it in [0, 1], with a sigmoid say")
        _check_gradients(key, generator, images)
    if network.critic is not None:
        key, critic = "network.critic", build_critic(*arguments).to(dtype)
        if _check_norms(key, critic) and (penalises(config.training) or accumulation > 1):
            raise UserError(
                f"{key} has batch norm: gradient penalties and runtime.accumulation need scores that depend on one "
                "image alone (Gulrajani et al. 2017, section 4); use another norm"
            )
        scores, logits = _call(key, critic, torch.rand(shape, dtype=dtype, generator=torch.Generator()))
        _check_shape(key, "scores", scores, (TRIAL_IMAGES,))
        if num_classes:
            _check_shape(key, "logits", logits, (TRIAL_IMAGES, num_classes))
        elif logits is not None:
            raise UserError(f"{key} gives logits, but there are no classes to tell apart: give None")
        _check_gradients(key, critic, scores if logits is None else scores + logits.sum(1))


def check_user_objective(name: str, objective: AnyObjective, dtype: torch.dtype) -> None:
    """Tries each loss of the user's own objective on a few scores. Raises UserError if it does not make one number."""
    names = ("critic_loss", "generator_loss") if objective.paired else ("real_loss", "fake_loss", "generator_loss")
    scores = torch.linspace(-1, 1, TRIAL_IMAGES, dtype=dtype, requires_grad=True)
    for key, loss in ((f"training.objective {name}: {loss}", getattr(objective, loss)) for loss in names):
        value = _call(key, loss, *[scores] * (1 + objective.paired))
        if not isinstance(value, Tensor) or value.shape:
            actual = f"shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise UserError(f"{key} returns {actual}: return a scalar tensor, such as the mean (.mean())")


def _call(key: str, network: Callable[..., Any], *inputs: Tensor) -> Any:
    """Returns what a network in training mode, or a loss, gives. Raises UserError if it fails or draws at random."""
    with torch.random.fork_rng(devices=[]):
        before = torch.get_rng_state()
        try:
            outputs = network(*inputs)
        except Exception as error:  # the user's code may raise anything
            given = " and ".join(f"{tensor.dtype} {list(tensor.shape)}" for tensor in inputs)
            raise UserError(f"{key} was given {given} and failed ({describe_error(error)})") from error
        if not torch.equal(before, torch.get_rng_state()):
            raise UserError(
                f"{key} draws random numbers when it is called (dropout, noise), so that no run of it could be "
                "repeated: leave them out"
            )
    return outputs


def _check_shape(key: str, what: str, output: object, shape: tuple[int, ...]) -> None:
    if not isinstance(output, Tensor) or output.shape != shape:
        actual = list(output.shape) if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise UserError(f"{key} gives {what} of shape {actual}, where {list(shape)} are expected")


def _check_norms(key: str, network: nn.Module) -> bool:
    """Returns whether an image's output depends on other images, through batch norms or instance norms with running
    statistics. Raises UserError for one that can't take its statistics over all ranks."""
    depends = False
    for name, norm in network.named_modules():
        is_batch_norm = isinstance(norm, (*BATCH_NORMS, nn.SyncBatchNorm))
        if not (is_batch_norm or (isinstance(norm, INSTANCE_NORMS) and norm.track_running_stats)):
            continue
        depends = True
        if not (type(norm) in BATCH_NORMS and norm.affine and norm.track_running_stats and norm.momentum is not None):
            raise UserError(
                f"{key}: {name.removeprefix('network.')} is {norm}: over several ranks there are torch's BatchNorm1d, "
                "2d and 3d, affine and with running statistics of a fixed momentum"
            )
    return depends


def _check_gradients(key: str, network: nn.Module, outputs: Tensor) -> None:
    """Raises UserError for a parameter without a gradient: optimisers, and DDP when it averages, expect them all."""
    if not outputs.requires_grad:
        raise UserError(f"{key} gives what no parameter has a part in: there is nothing to train")
    torch.autograd.backward(outputs.sum())
    for name, parameter in network.named_parameters():
        if parameter.grad is None:
            raise UserError(
                f"{key}: the parameter {name.removeprefix('network.')} has no part in what it gives, or is frozen: "
                "leave it out, or make it a buffer"
            )
