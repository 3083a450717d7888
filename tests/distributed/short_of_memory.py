"""A program in an address space of so many MiB more than it takes: `short_of_memory.py MIB SCRIPT [ARGUMENTS]`."""

from __future__ import annotations

import resource
import runpy
import sys

import psutil

_, mib, *sys.argv = sys.argv
room = psutil.Process().memory_info().vms + int(mib) * 2**20
resource.setrlimit(resource.RLIMIT_AS, (room, room))
runpy.run_path(sys.argv[0], run_name="__main__")
