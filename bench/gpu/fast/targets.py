"""The targets of `make gpu-bench` on one H100 or H200."""

from bench.gpu.targets import Target

TARGETS: tuple[Target, ...] = ()
