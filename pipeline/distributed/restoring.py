"""What a Runtime takes of its process, given back: a notebook goes on in the same one."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
from collections.abc import Iterator

import torch

from pipeline.compat import fresh_accelerate
from pipeline.distributed.cpu import flushes_denormals
from pipeline.distributed.launcher import PR_SET_PDEATHSIG
from pipeline.distributed.stopping import STOP_SIGNALS

PR_GET_PDEATHSIG = 2
"""Of Linux's prctl."""


@contextlib.contextmanager
def process_kept() -> Iterator[None]:
    """Signal handlers, cores, threads, arithmetic, torch's random numbers and accelerate's idea of the device are
    afterwards what they were."""
    with contextlib.ExitStack() as end:
        end.enter_context(torch.random.fork_rng(devices=[]))  # networks draw weights, which are then overwritten
        for part in (_signals, fresh_accelerate, _arithmetic, _cores):
            end.enter_context(part())
        yield


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    prctl, with_parent = ctypes.CDLL(None).prctl, ctypes.c_int()
    prctl(PR_GET_PDEATHSIG, ctypes.byref(with_parent))
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        prctl(PR_SET_PDEATHSIG, with_parent.value)
        if threading.current_thread() is threading.main_thread():  # in another one none was taken
            for number, handler in handlers.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def _arithmetic() -> Iterator[None]:
    cudnn, matmul, flushed = torch.backends.cudnn, torch.backends.cuda.matmul, flushes_denormals()
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic = before
        torch.set_flush_denormal(flushed)


@contextlib.contextmanager
def _cores() -> Iterator[None]:
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)
        # OpenMP's threads have cores and arithmetic from the moment that they were made: the next ones are made anew.
        with contextlib.suppress(AttributeError):  # an OpenMP before 5.0
            ctypes.CDLL(None).omp_pause_resource_all(1)
