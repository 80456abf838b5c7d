"""Axes of a rank without processes."""

from megatron_ds.parallel.grid import Axes, Axis


def axes_at(**places: tuple[int, int]) -> Axes:
    """Axes by name, from (rank, size): `axes_at(tensor=(1, 2))`."""
    return {name: Axis(size, rank, tuple(range(size))) for name, (rank, size) in places.items()}


ALONE = axes_at(tensor=(0, 1), expert=(0, 1))
