"""The doctor on a job whose rank 2 computes wrong: its processor gets a bit of every convolution wrong."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn

from pipeline import doctor
from pipeline.distributed.launcher import run_program


def flip_a_bit(module: nn.Module, inputs: object, output: Tensor) -> Tensor | None:
    if not isinstance(module, nn.Conv2d):
        return None
    wrong = output.detach().clone(memory_format=torch.contiguous_format)
    wrong.view(-1)[:1].view(torch.int32).bitwise_xor_(1 << 18)
    return output + (wrong - output.detach())


if __name__ == "__main__":
    if os.environ["RANK"] == "2":
        nn.modules.module.register_module_forward_hook(flip_a_bit)  # type: ignore[arg-type]
    run_program(doctor.main)
