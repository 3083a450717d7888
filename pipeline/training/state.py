"""Everything that continuing a run needs, declared once: generator, critic, both optimisers, the generator's moving
average, fp16's loss scale, step. Random numbers are functions of the seed and the step (pipeline/rng.py), so no state
of a random number generator is among them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pipeline.config import Config, OptimizerConfig
from pipeline.errors import UserError
from pipeline.models.networks import AnyGenerator, Critic, Generator, build_critic, build_generator, dtype_of
from pipeline.models.spectral_norm import use_spectral_norm
from pipeline.rng import seeded
from pipeline.storage.checkpoint import under

Network = TypeVar("Network", bound=nn.Module)


@dataclass
class TrainingState:
    """The state of a training. Its networks are the bare modules; DDP's wrappers share their parameters.

    Only a step changes the networks, their gradients and the optimisers. Whatever else computes with a network, be it
    an evaluation, samples, an export or a measurement, gets a copy (`copied_generator`, `copied_critic`).
    """

    generator: AnyGenerator
    critic: nn.Module
    ema: AnyGenerator
    generator_optimizer: torch.optim.Optimizer
    critic_optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    new_generator: Callable[[], AnyGenerator]
    new_critic: Callable[[], nn.Module]
    """These build the networks as they were at step 0."""
    step: int = 0

    @property
    def num_weights(self) -> dict[str, int]:
        """Number of weights that are trained, of each network."""
        networks = {"generator": self.generator, "critic": self.critic}
        return {name: sum(each.numel() for each in network.parameters()) for name, network in networks.items()}

    def copied_generator(self, weights: str) -> AnyGenerator:
        """Returns a copy, for reading only, of the generator's moving average ("ema") or of the generator ("raw")."""
        copied = _copied(self.ema if weights == "ema" else self.generator, self.new_generator)
        copied.class_names = self.generator.class_names
        return copied

    def copied_critic(self) -> nn.Module:
        """Returns a copy of the critic, for reading only."""
        return _copied(self.critic, self.new_critic)

    def tensors(self) -> dict[str, Tensor]:
        """Returns every tensor of the state under a unique name; they share memory with the live state."""
        named: dict[str, Tensor] = {}
        for role in ("generator", "critic", "ema"):
            named |= {f"{role}.{name}": tensor for name, tensor in getattr(self, role).state_dict().items()}
        for role in ("generator", "critic"):
            optimizer = getattr(self, f"{role}_optimizer")
            for name, parameter in getattr(self, role).named_parameters():
                named |= {f"{role}_optimizer.{name}.{key}": value for key, value in optimizer.state[parameter].items()}
        scaler = self.scaler.state_dict()  # empty unless the precision is fp16
        for key in ("scale", "_growth_tracker"):  # the loss scale, and for how many steps it has stood
            if key in scaler:
                named[f"scaler.{key}"] = torch.tensor(scaler[key], dtype=torch.float64)
        return named

    def load(self, tensors: dict[str, Tensor], step: int) -> None:
        """Replaces the state by saved tensors.

        Raises:
            UserError: a tensor is missing, left over, or of another shape or dtype.
        """
        for role in ("generator", "critic", "ema"):
            network, saved = getattr(self, role), under(tensors, role)
            _check_same(role, saved, network.state_dict())
            network.load_state_dict(saved)
        scale = under(tensors, "scaler")
        for role in ("generator", "critic"):
            optimizer, saved = getattr(self, f"{role}_optimizer"), under(tensors, f"{role}_optimizer")
            if scale and not saved:
                continue  # saved before the first update that did not overflow at fp16's first loss scales
            state: dict[int, dict[str, Tensor]] = {}
            for index, (name, parameter) in enumerate(getattr(self, role).named_parameters()):
                state[index] = under(saved, name)
                moments = {key: value for key, value in state[index].items() if key != "step"}
                if not moments:
                    raise UserError(f"the checkpoint has no state of {role}_optimizer for {name}")
                _check_same(f"{role}_optimizer.{name}", moments, dict.fromkeys(moments, parameter))
                # In the parameter's memory layout: otherwise the optimiser leaves its fast path and takes 2.5 times as
                # long on a CPU.
                state[index] |= {key: torch.empty_like(parameter).copy_(value) for key, value in moments.items()}
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        if scale:
            saved_scale = {"scale": scale["scale"].item(), "_growth_tracker": int(scale["_growth_tracker"])}
            self.scaler.load_state_dict(self.scaler.state_dict() | saved_scale)
        self.step = step

    @torch.no_grad()
    def update_ema(self, weight: float | Tensor) -> None:
        """Moves the average towards the generator: average += weight (value - average), for parameters and batch norm's
        moving statistics. Counters of batches stay."""
        networks = self.ema.state_dict().values(), self.generator.state_dict().values()
        averages, values = ([each for each in tensors if each.is_floating_point()] for tensors in networks)
        if isinstance(weight, Tensor):  # a lerp by a tensor would take one launch for each of them
            distances = torch._foreach_sub(values, averages)
            torch._foreach_mul_(distances, weight)
            torch._foreach_add_(averages, distances)
        else:
            torch._foreach_lerp_(averages, values, weight)


def _copied(network: Network, build: Callable[[], Network]) -> Network:
    """Returns a network with the same weights, in eval mode, without gradients.

    It is built anew: deepcopy would also copy what training has put on the network (hooks, the forward pass under
    autocast), and fails where a user's network keeps a tensor that it has computed.
    """
    copied = build()
    copied.load_state_dict(network.state_dict())
    return copied.eval().requires_grad_(False)


def build_state(
    config: Config,
    image_shape: tuple[int, int, int],
    num_classes: int,
    device: torch.device,
    scaler: torch.amp.GradScaler,
    capturable: bool = False,
) -> TrainingState:
    """Builds the state at step 0, which is a function of the seed.

    Args:
        num_classes: the number of classes that the networks are conditioned on; 0 for an unconditional GAN.
        scaler: fp16's loss scaler, or a disabled one.
        capturable: see `build_optimizer`.
    """
    seed, arguments = config.training.seed, (config.network, image_shape, num_classes)

    def placed(network: Network) -> Network:
        network.to(device, dtype_of(config))
        if isinstance(network, Generator | Critic):  # a user's network stays as it was made
            network.to(memory_format=torch.channels_last)
            if device.type == "cpu":
                from pipeline.models.cpu_kernels import use_cpu_kernels

                use_cpu_kernels(network)
        return network

    def new_generator() -> AnyGenerator:
        return placed(build_generator(*arguments, seeded(seed, "generator weights")))

    def new_critic() -> nn.Module:
        critic = placed(build_critic(*arguments, seeded(seed, "critic weights")))
        if config.training.spectral_norm:
            use_spectral_norm(critic, seeded(seed, "singular vectors"))
        return critic

    generator, critic = new_generator(), new_critic()
    ema = _copied(generator, new_generator)
    generator_optimizer = build_optimizer(config.training.generator_optimizer, generator, capturable)
    critic_optimizer = build_optimizer(config.training.critic_optimizer, critic, capturable)
    networks, optimizers = (generator, critic, ema), (generator_optimizer, critic_optimizer)
    return TrainingState(*networks, *optimizers, scaler, new_generator, new_critic)


def build_optimizer(config: OptimizerConfig, network: nn.Module, capturable: bool = False) -> torch.optim.Optimizer:
    """Builds the optimiser that `config` describes for a network's parameters. With `capturable` its state lives on the
    GPU, so that a step can be captured in a CUDA graph.

    RMSprop is v = rho v + (1 - rho) g^2, w -= lr g / (sqrt(v) + epsilon), as in torch, in Keras up to 2.3.1 and in its
    legacy classes, which the notebook ran with. Keras has taken lr g / sqrt(v + epsilon) since 2.11: there the notebook
    trains differently at first, and its critic's weights grow 30 times more slowly in the first dozen steps.
    """
    common: dict[str, Any] = {"lr": config.learning_rate, "eps": config.epsilon, "capturable": capturable}
    if config.algorithm == "adam" and capturable and config.final_beta2 is not None:
        from pipeline.training.cuda_graph import CapturableAdam

        return CapturableAdam(network.parameters(), betas=config.betas, **common)
    if config.algorithm == "adam":
        weight = next(network.parameters())
        fused = weight.is_cuda and weight.dtype == torch.float32  # its kernel takes a captured rate in float32 alone
        return torch.optim.Adam(network.parameters(), betas=config.betas, fused=fused, foreach=not fused, **common)
    return torch.optim.RMSprop(network.parameters(), alpha=config.rho, foreach=True, **common)


def _check_same(role: str, *states: dict[str, Tensor]) -> None:
    saved, expected = ({(name, tuple(t.shape), t.dtype) for name, t in tensors.items()} for tensors in states)
    if unmatched := sorted({f"{role}.{name}" for name, *_ in saved ^ expected}):
        raise UserError(f"the checkpoint does not fit this configuration: it differs in {', '.join(unmatched)}")
