"""Machines as far as the network goes: a namespace each, and between them links of a bandwidth and a delay that can be
cut.

Each namespace has one device, a TUN; a thread here carries the packets from one to the other, late. How fast a machine
sends is limited by tc's token bucket in its namespace. It takes root, and a kernel that lets root do this.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import struct
import subprocess
import threading
import time
from collections import deque
from pathlib import Path
from typing import Self

DEVICE = "net0"
MTU = 9000
CLONE_NEWNET, TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x40000000, 0x400454CA, 0x0001, 0x1000
FOLDER = Path("/var/run/netns")
DESTINATION = slice(16, 20)
"""Of an IPv4 header."""


def enter(namespace: str) -> None:
    """Takes the calling thread, and all that it starts, into a namespace."""
    with (FOLDER / namespace).open() as file:
        _setns(file.fileno())


def _setns(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def address(machine: int) -> str:
    return f"10.77.0.{machine + 1}"


class Network:
    """Machines 0, 1, ... in the namespaces `name`-0, `name`-1, ...; a context.

    Raises PermissionError where the system does not let one make them."""

    def __init__(self, machines: int, *, megabits: float | None, delay_seconds: float) -> None:
        """`megabits` a second that a machine can send, None: as many as it can; `delay_seconds` one way."""
        self.names = [f"gan{os.getpid()}-{machine}" for machine in range(machines)]
        self._megabits, self._delay = megabits, delay_seconds
        self._cut: set[int] = set()
        self._ended = threading.Event()
        self._devices: list[int] = []
        self._carrier = threading.Thread(target=self._carry, daemon=True)

    def cut(self, machine: int) -> None:
        """From now on nothing reaches or leaves this machine."""
        self._cut.add(machine)

    def mend(self) -> None:
        self._cut.clear()

    def __enter__(self) -> Self:
        try:
            for machine, name in enumerate(self.names):
                run("ip", "netns", "add", name)
                self._devices.append(self._open_device(name))
                inside = ("ip", "netns", "exec", name)
                run(*inside, "ip", "link", "set", "lo", "up")
                run(*inside, "ip", "address", "add", f"{address(machine)}/24", "dev", DEVICE)
                run(*inside, "ip", "link", "set", DEVICE, "mtu", str(MTU), "txqueuelen", "10000", "up")
                if self._megabits is not None:
                    limit = ("rate", f"{self._megabits}mbit", "burst", "64kb", "limit", "64mb")
                    run(*inside, "tc", "qdisc", "add", "dev", DEVICE, "root", "tbf", *limit)
        except BaseException:
            self._take_down()
            raise
        self._carrier.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._carrier.join()
        self._take_down()

    def _take_down(self) -> None:
        for device in self._devices:
            os.close(device)
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)

    def _open_device(self, name: str) -> int:
        """A TUN in a namespace, open here."""
        with Path("/proc/thread-self/ns/net").open() as home:
            try:
                enter(name)
                device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
                fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), IFF_TUN | IFF_NO_PI))
            except OSError as error:
                raise PermissionError(f"no TUN device: {error}") from None
            finally:
                _setns(home.fileno())
        return device

    def _carry(self) -> None:
        """Every packet takes the same time, so they arrive in the order in which they left."""
        machine_of = {bytes(map(int, address(machine).split("."))): machine for machine in range(len(self.names))}
        late: deque[tuple[float, int, bytes]] = deque()
        while not self._ended.is_set():
            wait = 0.2 if not late else max(0.0, late[0][0] - time.monotonic())
            for device in select.select(self._devices, [], [], min(wait, 0.2))[0]:
                source = self._devices.index(device)
                with contextlib.suppress(BlockingIOError):
                    for _ in range(32):
                        packet = os.read(device, MTU)
                        target = machine_of.get(packet[DESTINATION])
                        if target is not None and not self._cut & {source, target}:
                            late.append((time.monotonic() + self._delay, target, packet))
            now = time.monotonic()
            while late and late[0][0] <= now:
                _, target, packet = late.popleft()
                with contextlib.suppress(OSError):  # full, or not up: lost
                    os.write(self._devices[target], packet)


def run(*command: str) -> None:
    """Raises PermissionError with what the command said."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise PermissionError(str(error)) from None
    if result.returncode:
        raise PermissionError(f"{' '.join(command)}: {result.stderr.strip()}")
