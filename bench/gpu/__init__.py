"""Check and measure the package on one GPU: `make gpu-check` (is it right?) and `make gpu-bench` (how fast?).

`python -m bench.gpu check` and `python -m bench.gpu bench` are the commands. `driver` runs the parts of a command, each
a process of its own with a time limit; `right/parts.py` and `fast/parts.py` list them. A part writes its results as
lines of JSON (`record`), and `report` makes `bench/RESULTS-GPU.md`, its chart and its JSON from them. `wheels` fetches
the packages that a bare CUDA image lacks.
"""
