"""What can be refused of networks of the user's own before a run: they are tried on a few images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import Config
from pipeline.distributed.batch_norm import CONVERTED
from pipeline.errors import UserError
from pipeline.models.user_networks import UserCritic, UserGenerator, told

BATCH_NORMS = (*CONVERTED, nn.SyncBatchNorm)
INSTANCE_NORMS = nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d
"""With running statistics these depend on other images, too."""
IMAGES = 4
"""Of a trial."""


def check_user_networks(config: Config, image_shape: tuple[int, int, int], num_classes: int) -> None:
    """Raises UserError where a network of the user's own does not do what `models/user_networks.py` asks of it, or what
    a run with these settings takes."""
    training, dtype = config.training, torch.float64 if config.runtime.precision == "float64" else torch.float32
    given = config.network, image_shape, num_classes
    labels = torch.arange(IMAGES) % max(num_classes, 1)
    if config.network.generator is not None:
        key, generator = "network.generator", UserGenerator(*given, torch.Generator()).to(dtype)
        if config.runtime.accumulation > 1:
            raise UserError(
                f"runtime.accumulation is {config.runtime.accumulation}: {key}, a network of your own, can't be taken "
                "in parts: set it to 1"
            )
        _check_norms(key, generator)
        latents = torch.linspace(-1, 1, IMAGES * config.network.latent_dim, dtype=dtype).view(IMAGES, -1)
        images = _tried(key, generator, latents, labels)
        _check_shape(key, "images", images, (IMAGES, *image_shape))
        if not 0 <= images.min() <= images.max() <= 1:
            low, high = images.min().item(), images.max().item()
            raise UserError(f"{key} makes pixels from {low:.3g} to {high:.3g}: end it in [0, 1], with a sigmoid say")
        _check_gradients(key, generator, images)
    if config.network.critic is not None:
        key, critic = "network.critic", UserCritic(*given, torch.Generator()).to(dtype)
        slopes = training.gradient_penalty is not None or training.r1_penalty is not None
        if _check_norms(key, critic) and (slopes or config.runtime.accumulation > 1):
            raise UserError(
                f"{key} has batch norm: gradient penalties and runtime.accumulation need scores that depend on one "
                "image alone (Gulrajani et al. 2017, section 4); use another norm"
            )
        scores, logits = _tried(key, critic, torch.rand(IMAGES, *image_shape, dtype=dtype, generator=torch.Generator()))
        _check_shape(key, "scores", scores, (IMAGES,))
        if num_classes:
            _check_shape(key, "logits", logits, (IMAGES, num_classes))
        elif logits is not None:
            raise UserError(f"{key} gives logits, but there are no classes to tell apart: give None")
        _check_gradients(key, critic, scores if logits is None else scores + logits.sum(1))


def _tried(key: str, network: nn.Module, *inputs: Tensor) -> Any:
    """What a network gives in training mode, where it may not be a matter of chance."""
    with torch.random.fork_rng(devices=[]):
        before = torch.get_rng_state()
        try:
            found = network(*inputs)
        except Exception as error:  # the user's code may raise anything
            shape = list(inputs[0].shape)
            raise UserError(f"{key} was given {inputs[0].dtype} {shape} and failed ({told(error)})") from error
        if not torch.equal(before, torch.get_rng_state()):
            raise UserError(
                f"{key} draws random numbers when it is called (dropout, noise), so that no run of it could be "
                "repeated: leave them out"
            )
    return found


def _check_shape(key: str, what: str, found: object, shape: tuple[int, ...]) -> None:
    if not isinstance(found, Tensor) or found.shape != shape:
        told_shape = list(found.shape) if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise UserError(f"{key} gives {what} of shape {told_shape}, where {list(shape)} are expected")


def _check_norms(key: str, network: nn.Module) -> bool:
    """Whether there are batch norms, all of which must be such as can take statistics over all ranks."""
    found = False
    for name, norm in network.named_modules():
        if not (isinstance(norm, BATCH_NORMS) or (isinstance(norm, INSTANCE_NORMS) and norm.track_running_stats)):
            continue
        found = True
        if not (type(norm) in CONVERTED and norm.affine and norm.track_running_stats and norm.momentum is not None):
            raise UserError(
                f"{key}: {name.removeprefix('network.')} is {norm}: over several ranks there are torch's BatchNorm1d, "
                "2d and 3d, affine and with running statistics of a fixed momentum"
            )
    return found


def _check_gradients(key: str, network: nn.Module, outputs: Tensor) -> None:
    """Optimisers and the averaging of gradients take every parameter for trained."""
    if not outputs.requires_grad:
        raise UserError(f"{key} gives what no parameter has a part in: there is nothing to train")
    torch.autograd.backward(outputs.sum())
    for name, parameter in network.named_parameters():
        if parameter.grad is None:
            raise UserError(
                f"{key}: the parameter {name.removeprefix('network.')} has no part in what it gives, or is frozen: "
                "leave it out, or make it a buffer"
            )
