"""The parts of `make gpu-check`, the most telling first."""

from bench.gpu.part import Part

PARTS: tuple[Part, ...] = ()
