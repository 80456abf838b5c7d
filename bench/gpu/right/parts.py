"""The parts of `make gpu-check`: kernels first, then those that wait for the CPU side by side, then saves alone."""

from bench.gpu.part import Part

BEGINNING, SIDE_BY_SIDE = "beginning", "side by side"
# Parts that fork ranks must not start CUDA when they ask whether there is a GPU.
FORKING = {"OMP_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
CPU_ONLY = {"DEVICE": "cpu", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "4"}


def _beside(name: str, limit_s: float, module: str = "", *arguments: str) -> Part:
    return Part(name, f"bench.gpu.right.{module or name}", arguments, limit_s, SIDE_BY_SIDE, FORKING)


PARTS: tuple[Part, ...] = (
    Part("kernels", "bench.gpu.right.kernels", (), 60.0, BEGINNING),
    Part("reference", "bench.gpu.right.reference", (), 100.0, BEGINNING, CPU_ONLY),
    _beside("compiled-kernels", 240.0, "kernels", "compiled"),
    _beside("parity", 200.0),
    _beside("fp32", 200.0, "matrix", "fp32"),
    _beside("bf16", 200.0, "matrix", "bf16"),
    _beside("fp16", 200.0, "matrix", "fp16"),
    _beside("compiled", 240.0, "matrix", "compiled"),
    _beside("compiled-more", 240.0, "matrix", "compiled-more"),
    _beside("layouts", 240.0),
    _beside("experts", 240.0),
    _beside("nccl", 100.0),
    _beside("resume", 200.0),
    _beside("command", 200.0),
    _beside("waits", 150.0),
    _beside("tests", 240.0),
    Part("saves", "bench.gpu.right.saves", (), 80.0, environment=FORKING),
)
