"""Is it right on a GPU? Each module is a part of `make gpu-check`; `parts.py` lists them, docs/gpu.md describes them.

A wrong kernel would make every part wrong. `kernels` finds them first, and the other parts then use PyTorch's code for
their operations (`chosen_kernels`), so that one fault does not hide others.
"""
