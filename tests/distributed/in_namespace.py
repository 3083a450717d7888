"""A rank on a machine of its own: `in_namespace.py NAMES RANKS_A_MACHINE SCRIPT [ARGUMENT ...]` runs a script in the
namespace of the rank's machine; NAMES are theirs with commas between."""

from __future__ import annotations

import os
import runpy
import sys

from tests.distributed.network import DEVICE, address, enter

if __name__ == "__main__":
    names, ranks_a_machine, script = sys.argv[1].split(","), int(sys.argv[2]), sys.argv[3]
    enter(names[int(os.environ["RANK"]) // ranks_a_machine])
    os.environ["MASTER_ADDR"] = address(0)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", DEVICE)
    sys.argv[:] = sys.argv[3:]
    runpy.run_path(script, run_name="__main__")
