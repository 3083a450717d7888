"""Every use of a private name of another package, each a small function that says why there is no public way.

When a package changes such a name, the test of that function in tests/test_compat.py fails by its name. Packages are
imported inside: programs that need none of them start without.
"""

from __future__ import annotations

import atexit
import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def run_exit_functions() -> None:
    """Runs the functions that were registered with `atexit`, for a process that ends by `os._exit`. Python has no
    public call."""
    atexit._run_exitfuncs()


def leave_buffers_alone(network: nn.Module) -> None:
    """Keeps DistributedDataParallel from broadcasting a network's buffers, which are equal on all ranks by
    construction. Even with `broadcast_buffers=False` it compares and sends them once when it is built."""
    from torch.nn.parallel import DistributedDataParallel

    names = [name for name, _ in network.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(network, names)  # type: ignore[no-untyped-call]


def settle_buckets(wrapped: nn.parallel.DistributedDataParallel) -> None:
    """Makes DDP group its gradients now as it would after its first step. The rounding of a sum over more than two
    ranks depends on the grouping, so a resumed run would leave the uninterrupted one's trajectory. There is no
    setting."""
    wrapped.reducer._push_all_rebuilt_params()
    wrapped.reducer._rebuild_buckets()


def stop_timing(wrapped: nn.parallel.DistributedDataParallel) -> None:
    """Keeps DDP from timing its first ten iterations and some later ones: on CUDA it waits for the device then, which
    is an error within a graph capture. The sample rate that can be set does not affect the first ten."""
    from torch._C._distributed_c10d import Logger

    class Untimed(Logger):
        def set_runtime_stats_and_log(self) -> None:
            """Does nothing."""

    wrapped.logger = Untimed(wrapped.reducer)


@contextlib.contextmanager
def fresh_accelerate() -> Iterator[None]:
    """Gives the block an accelerate that has no state yet, and restores the state at the end. accelerate keeps the
    device and precision of the first Accelerator for all later ones of a process; its public reset would lose those of
    an Accelerator that the user made before."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    shared = [state._shared_state for state in (PartialState, AcceleratorState, GradientState)]
    before = [dict(state) for state in shared]
    try:
        for state in shared:
            state.clear()
        yield
    finally:
        for state, values in zip(shared, before, strict=True):
            state.clear()
            state.update(values)


def has_matrix_tiles() -> bool:
    """Returns whether the processor multiplies matrices in hardware (AMX), which torch's public capabilities do not say
    in 2.11."""
    import torch

    return bool(torch.cpu._is_amx_tile_supported())


def arguments_of(parser: Any) -> list[Any]:
    """Returns the arguments of a parser, to change their help: argparse lists them nowhere in public."""
    return list(parser._actions)


def time_by_steady_clock(bar: Any) -> None:
    """Makes a tqdm bar use the monotonic clock. The system's, which it uses, may be set: a day back, and a log gets no
    line for a day. tqdm has no argument for it."""
    bar._time = time.monotonic
    bar.start_t = bar.last_print_t = time.monotonic()
