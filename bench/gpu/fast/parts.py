"""The parts of `make gpu-bench`, the most telling first, so that a run that is cut off says the most."""

from bench.gpu.part import Part

PARTS: tuple[Part, ...] = ()
