"""The parts of `make gpu-check`, which show that results on a GPU are right; docs/gpu.md describes them.

A wrong kernel would make every part wrong. `kernels` finds them first, and the other parts then use PyTorch's code for
their operations (`chosen_kernels`), so that one fault does not hide others.
"""
