"""A slow link with losses between two machines: `python -m tests.cluster.slow_link NAME DELAY_S LOSS PID:ADDRESS ...`.

Each machine gets a network device NAME (a TAP device), and this process carries the frames between them: it delivers
them DELAY_S later and drops a share LOSS of them. Linux has `tc netem` for this, which many kernels come without.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import os
import random
import select
import struct
import subprocess
import sys
import time

_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
_FRAME_BYTES = 2048
_IDLE_S = 0.5


def _open_device(name: str, pid: str, address: str) -> int:
    """Make a TAP device in the network of a machine; return its descriptor."""
    libc = ctypes.CDLL(None, use_errno=True)
    own = os.open("/proc/self/ns/net", os.O_RDONLY)
    other = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
    if libc.setns(other, 0) != 0:
        raise OSError(ctypes.get_errno(), "setns")
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH", name.encode(), _IFF_TAP | _IFF_NO_PI))
    subprocess.run(["ip", "addr", "add", f"{address}/24", "dev", name], check=True)
    subprocess.run(["ip", "link", "set", name, "up"], check=True)
    libc.setns(own, 0)
    return device


def main(name: str, delay_s: float, loss: float, ends: list[str]) -> None:
    first, second = (_open_device(name, *end.split(":")) for end in ends)
    other = {first: second, second: first}
    chance, number, waiting = random.Random(1), 0, list[tuple[float, int, int, bytes]]()
    print("up", flush=True)
    while True:
        idle_s = max(0.0, waiting[0][0] - time.monotonic()) if waiting else _IDLE_S
        ready, _, _ = select.select([first, second], [], [], idle_s)
        for device in ready:
            try:
                while frame := os.read(device, _FRAME_BYTES):
                    number += 1
                    if chance.random() >= loss:
                        heapq.heappush(waiting, (time.monotonic() + delay_s, number, other[device], frame))
            except BlockingIOError:
                continue
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, device, frame = heapq.heappop(waiting)
            os.write(device, frame)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), float(sys.argv[3]), sys.argv[4:])
