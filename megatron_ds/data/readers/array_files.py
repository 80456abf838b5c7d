"""Arrays in `.npy` files, memory-mapped.

The header is read as text of the only form that `numpy.save` writes for such arrays, and is not evaluated. Dtype, dims
and the size of the file are checked first, so nothing is allocated for a header that lies.
"""

import re
from math import prod
from pathlib import Path

import numpy as np

_START = b"\x93NUMPY\x01\x00"  # version 1.0: the length of the header follows in two bytes
_HEADER = re.compile(
    rb"\{'descr': '[<|](?P<dtype>[a-zA-Z]\d{1,8})', 'fortran_order': False, "
    rb"'shape': \((?P<shape>[\d, ]{0,99})\), \} *\n"
)


def map_array(path: Path, kinds: str) -> np.ndarray:
    """Map an array that `numpy.save` has written.

    Args:
        path: the file.
        kinds: what it may be, each a dtype and a number of dims, such as "i8 1" or "i8 1, f4 2"; "U 1" stands for texts
            of any length.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no such array, or has not the size that its header says.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path.name} is missing")
    with path.open("rb") as file:
        start = file.read(len(_START) + 2)
        length = int.from_bytes(start[len(_START) :], "little")
        header = _HEADER.fullmatch(file.read(length)) if start.startswith(_START) else None
    if header is None:
        raise ValueError(f"{path.name} is no array")
    code, shape = header["dtype"].decode(), tuple(map(int, header["shape"].replace(b",", b" ").split()))
    kind = f"{'U' if code[0] == 'U' else code} {len(shape)}"
    if kind not in kinds.split(", "):
        raise ValueError(f"{path.name} holds {code} in {len(shape)} dims, not {kinds}")
    dtype, offset = np.dtype(f"<{code}"), len(_START) + 2 + length
    if offset + dtype.itemsize * prod(shape) != path.stat().st_size:
        raise ValueError(f"{path.name} has not the size that its header says")
    if dtype.itemsize * prod(shape) == 0:  # an empty file cannot be mapped
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, mode="r", offset=offset, shape=shape)


def check_starts(starts: np.ndarray, stop: int, name: str) -> None:
    """Check the starts of rows that follow one another: from 0, ascending, to the end.

    Args:
        starts: (n + 1,) start of each row, and the end of the last.
        stop: the end.
        name: of the array, for errors.

    Raises:
        ValueError: they do not.
    """
    if len(starts) == 0 or starts[0] != 0 or starts[-1] != stop or (starts[1:] < starts[:-1]).any():
        raise ValueError(f"{name} does not ascend from 0 to {stop}")
