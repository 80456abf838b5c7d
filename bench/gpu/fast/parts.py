"""The parts of `make gpu-bench`, the most telling first, so that a run that is cut off says the most."""

from __future__ import annotations

from bench.gpu.part import Part

FORKING = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
"""Environment of parts that fork their ranks: asking for GPUs must not forbid it."""


def train(name: str, case: str, contestant: str, limit_s: float) -> Part:
    """Return the part of a contestant of `train.CASES`."""
    return Part(name, "bench.gpu.fast.train", (case, contestant), limit_s)


PARTS: tuple[Part, ...] = (
    Part("products", "bench.gpu.fast.products", limit_s=30.0),
    train("llama-ours", "llama", "ours", 70.0),
    train("llama-transformers", "llama", "transformers", 50.0),
    train("llama-deepspeed", "llama", "DeepSpeed + transformers", 60.0),
    train("llama-ours-compiled", "llama", "ours, compiled", 90.0),
    train("llama-transformers-compiled", "llama", "transformers, compiled", 110.0),
    Part("blocks", "bench.gpu.fast.blocks", ("llama",), 100.0),
    Part("experts", "bench.gpu.fast.experts", limit_s=80.0),
    Part("head", "bench.gpu.fast.head", limit_s=40.0),
    Part("gemma", "bench.gpu.fast.blocks", ("gemma",), 70.0),
    Part("device-table", "bench.gpu.fast.device_table", limit_s=60.0, environment=FORKING),
    Part("plans", "bench.gpu.fast.plans", limit_s=120.0, environment=FORKING),
    train("long-ours", "long", "ours", 60.0),
    train("long-transformers", "long", "transformers", 60.0),
    Part("saving", "bench.gpu.fast.saving", limit_s=80.0),
    Part("losses", "bench.gpu.fast.losses", limit_s=50.0),
    Part("fp8", "bench.gpu.fast.fp8", limit_s=60.0),
    train("lora-ours", "lora", "ours", 50.0),
    train("lora-transformers", "lora", "transformers", 50.0),
    train("bert-ours", "bert", "ours", 50.0),
    train("bert-transformers", "bert", "transformers", 50.0),
)
