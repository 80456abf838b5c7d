"""The targets of `make gpu-bench` on one H100 or H200."""

from __future__ import annotations

from bench.gpu.judgement import Figure, Target

# The sections of the results. The modules that record them import them from here: this one needs no package.
LLAMA = "1.2 B Llama, 2 x 4,096 tokens"
LONG = "1.2 B Llama, 32,768 tokens, full recomputation"
LORA = "LoRA on 8 layers of an 8 B Llama, 2 x 4,096 tokens"
BERT = "BERT large, 32 x 512 tokens"
LLAMA_BLOCKS = "4 layers of an 8 B Llama, 2 x 4,096 tokens, forward and backward"
GEMMA_BLOCKS = "26 layers of Gemma 2 2B, 8,192 tokens, forward and backward"
EXPERT_BLOCKS = "4 layers of Qwen3-30B-A3B, 2 x 4,096 tokens, forward and backward"
EXPERTS_UP = "gate and up of 128 experts of Qwen3-30B-A3B, forward and both gradients"
EXPERTS_DOWN = "down of 128 experts of Qwen3-30B-A3B, forward and both gradients"
HEAD = "head and loss of an 8 B Llama, 8,192 tokens, vocabulary 128,256"
SMALL_HEAD = "head and loss of the 1.2 B Llama, 8,192 tokens, vocabulary 128,256"
SAVING = "saving a Llama of 0.5 B parameters, ZeRO-1"
PLANNED = "planned and measured: memory by torch's allocator, and time of a step"
LOSSES = "losses over 20 steps against fp32 on the CPU"

# The contestants.
OURS, COMPILED = "ours", "ours, compiled"
THEIRS, THEIRS_COMPILED = "transformers", "transformers, compiled"
DEEPSPEED = "DeepSpeed + transformers"
PACKED = "ours, 8 documents in a sequence"
CAPPED, UNCAPPED = "ours, with the cap", "ours, without the cap"
PRODUCTS = "its three products alone"
THEIRS_GROUPED = "transformers, grouped_mm"
GROUPED, DENSE = "ours, 128 groups", "one dense product of the same FLOPs"
SYNCHRONOUS, LATER = "synchronous", "asynchronous, a later one"


def _ours(section: str, key: str) -> tuple[Figure, ...]:
    return Figure(section, OURS, key), Figure(section, COMPILED, key)


TARGETS: tuple[Target, ...] = (
    Target(
        "1.2 B Llama: tokens/s relative to the best of transformers compiled and DeepSpeed",
        1.15,
        True,
        _ours(LLAMA, "tokens_s"),
        (Figure(LLAMA, THEIRS_COMPILED, "tokens_s"), Figure(LLAMA, DEEPSPEED, "tokens_s")),
    ),
    Target("1.2 B Llama: MFU", 0.5, True, _ours(LLAMA, "mfu"), percent=True),
    Target("4 layers of an 8 B, forward and backward: MFU", 0.6, True, _ours(LLAMA_BLOCKS, "mfu"), percent=True),
    Target(
        "4 layers of Qwen3-30B-A3B, forward and backward: tokens/s relative to transformers with grouped_mm",
        1.1,
        True,
        (Figure(EXPERT_BLOCKS, OURS, "tokens_s"),),
        (Figure(EXPERT_BLOCKS, THEIRS_GROUPED, "tokens_s"),),
    ),
    *(
        Target(
            f"{section}: TFLOP/s relative to {DENSE}",
            0.7,
            True,
            (Figure(section, GROUPED, "tflops"),),
            (Figure(section, DENSE, "tflops"),),
        )
        for section in (EXPERTS_UP, EXPERTS_DOWN)
    ),
    *(
        Target(
            f"{section}: time relative to its three products",
            1.15,
            False,
            (Figure(section, OURS, "ms"),),
            (Figure(section, PRODUCTS, "ms"),),
        )
        for section in (HEAD, SMALL_HEAD)
    ),
    Target(
        "8 packed documents: tokens/s relative to one document of the same length",
        0.97,
        True,
        (Figure(LLAMA, PACKED, "tokens_s"),),
        (Figure(LLAMA, OURS, "tokens_s"),),
    ),
    Target(
        "8 packed documents: peak memory relative to one document of the same length",
        1.01,
        False,
        (Figure(LLAMA, PACKED, "peak_gb"),),
        (Figure(LLAMA, OURS, "peak_gb"),),
    ),
    Target(
        "Gemma 2 shapes at 8,192 tokens: tokens/s relative to the same without caps",
        0.7,
        True,
        (Figure(GEMMA_BLOCKS, CAPPED, "tokens_s"),),
        (Figure(GEMMA_BLOCKS, UNCAPPED, "tokens_s"),),
    ),
    Target("Gemma 2 shapes at 8,192 tokens: peak GB", 80.0, False, (Figure(GEMMA_BLOCKS, CAPPED, "peak_gb"),)),
    Target(
        "32,768 tokens, recomputation: peak memory relative to transformers with gradient checkpointing",
        0.6,
        False,
        (Figure(LONG, OURS, "peak_gb"),),
        (Figure(LONG, THEIRS, "peak_gb"),),
    ),
    Target(
        "1.2 B Llama, ZeRO-1 on one rank: peak memory relative to DeepSpeed + transformers",
        0.85,
        False,
        (Figure(LLAMA, OURS, "peak_gb"),),
        (Figure(LLAMA, DEEPSPEED, "peak_gb"),),
    ),
    Target(
        "asynchronous save: pause relative to a synchronous save",
        0.1,
        False,
        (Figure(SAVING, LATER, "pause_s"),),
        (Figure(SAVING, SYNCHRONOUS, "pause_s"),),
        percent=True,
    ),
    Target(
        "losses over 20 steps in bf16: largest relative difference", 2e-2, False, (Figure(LOSSES, "ours, bf16", "off"),)
    ),
    Target(
        "losses over 20 steps in fp32: largest relative difference", 1e-5, False, (Figure(LOSSES, "ours, fp32", "off"),)
    ),
)
