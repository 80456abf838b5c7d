"""The addresses at which a process listens, as the kernel lists them."""

import os
import socket
from pathlib import Path

_LISTENS = "0A"


def listening_addresses() -> set[str]:
    """The addresses at which this process listens for connections, without their ports."""
    sockets = set()
    for file in Path("/proc/self/fd").iterdir():
        try:
            sockets.add(os.readlink(file))
        except FileNotFoundError:  # of this listing
            continue
    found = set()
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTENS and f"socket:[{fields[9]}]" in sockets:
                words = bytes.fromhex(fields[1].partition(":")[0])
                address = b"".join(words[place : place + 4][::-1] for place in range(0, len(words), 4))
                found.add(socket.inet_ntop(family, address))
    return found
