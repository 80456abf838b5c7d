"""The cases of the bench: contestants, their common work, and targets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from bench.work import Work

LLAMA = {
    "model_type": "llama",
    "vocab_size": 32_000,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 16_384,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BERT = {
    "model_type": "bert",
    "vocab_size": 30_522,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "max_position_embeddings": 512,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
T5 = {
    "model_type": "t5",
    "vocab_size": 32_128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 1024,
    "num_layers": 6,
    "num_decoder_layers": 6,
    "num_heads": 8,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.0,
    "tie_word_embeddings": True,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
}
MIXTRAL = {
    **LLAMA,
    "model_type": "mixtral",
    "vocab_size": 8192,
    "num_hidden_layers": 4,  # nine processes of a case share the memory of a small machine
    "intermediate_size": 704,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 2048,
    "output_router_logits": False,
}


@dataclass(frozen=True)
class Entry:
    """A contestant: a name in `contestant.RUNNERS`, its ranks and options, and the only device it runs on, if any.

    `environment` has variables that its process starts with.
    """

    runner: str
    world: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    device: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Target:
    """A target ratio between two contestants.

    Attributes:
        ours, other: labels of the contestants.
        bound: lower bound of the ratio of speeds, upper bound of the ratio of memory.
        figure: "speed", or "memory" per rank.
    """

    ours: str
    other: str
    bound: float
    figure: str = "speed"


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        title: short description.
        work: the work of all contestants.
        entries: label -> contestant; the first is the reference.
        targets: target ratios.
        unit: unit of the speed, "tokens/s" or "GB/s".
        steps: steps per turn.
        note: a remark for readers of the results.
    """

    title: str
    work: Work
    entries: Mapping[str, Entry]
    targets: tuple[Target, ...] = ()
    unit: str = "tokens/s"
    steps: int = 1
    note: str = ""

    @property
    def compared(self) -> set[str]:
        """The labels of the contestants that take part in targets."""
        return {label for target in self.targets for label in (target.ours, target.other)}

    def only_targets(self) -> Case:
        """Return the case with these contestants and the reference only."""
        kept = {*list(self.entries)[:1], *self.compared}
        return replace(self, entries={label: entry for label, entry in self.entries.items() if label in kept})


ALONE = Entry("transformers")
KEEPING = Entry(
    "transformers",
    device="cpu",
    environment={"MALLOC_MMAP_THRESHOLD_": str(2**28), "MALLOC_TRIM_THRESHOLD_": str(2**40)},
)
DECODER = Work(model=LLAMA)
LARGE_VOCABULARY = replace(DECODER, model={**LLAMA, "vocab_size": 128_000})
TWO_RANKS = {"tensor": 2}
SHARED = Entry("ours", 2, {**TWO_RANKS, "shared_memory": True}, device="cpu")
EXPERTS = Work(model=MIXTRAL)
HALF_THE_LAYERS = replace(DECODER, model={**LLAMA, "num_hidden_layers": 4}, batch=1, seq_length=8192, recompute=True)
EIGHT_K = replace(HALF_THE_LAYERS, model={**LLAMA, "num_hidden_layers": 4, "vocab_size": 8192})
THIRTY_TWO_K = replace(
    EIGHT_K,
    model={**EIGHT_K.model, "num_hidden_layers": 1, "max_position_embeddings": 32_768},
    seq_length=32_768,
)
SMALL = replace(DECODER, model={**LLAMA, "hidden_size": 256, "intermediate_size": 704, "vocab_size": 4096})

DIVIDED_SEQUENCE = {
    "transformers, 1 process": ALONE,
    "ours, 1 process": Entry("ours", options={"keep_attention": True}),
    "DeepSpeed Ulysses": Entry("ulysses", 2),
    "DeepSpeed Ulysses, tiled": Entry("ulysses", 2, {"tiled": True}),
    **{
        f"ours, {method}": Entry("ours", 2, {"context": {"size": 2, "method": method}, "keep_attention": True})
        for method in ("ulysses", "gather", "ring")
    },
}
DIVIDED_TARGETS = tuple(
    target
    for method in ("ulysses", "ring")
    for target in (
        Target(f"ours, {method}", "DeepSpeed Ulysses", 1.2),
        Target(f"ours, {method}", "transformers, 1 process", 0.6, "memory"),
    )
)
ABOUT_ULYSSES = (
    "DeepSpeed's is UlyssesSPAttentionHF in transformers' model; its tiles are those of the MLP and of the loss. Ours "
    "keeps what attention kernels return (`train.keep_attention`) and recomputes all else. The limit counts all pairs "
    "of positions, of which causal kernels compute half, so a fraction of it can exceed 100 %."
)

CASES: dict[str, Case] = {
    "one": Case(
        "one process",
        DECODER,
        {
            "transformers": ALONE,
            "transformers, keeping freed memory": KEEPING,
            "ours": Entry("ours"),
            "ours, compiled": Entry("ours", options={"compile": True}),
        },
        (Target("ours", "transformers", 1.05),),
        steps=2,
        note="Ours keeps the memory that it frees; glibc's MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ do the "
        "same for any program.",
    ),
    "tp2": Case(
        "tensor parallel on 2 ranks",
        DECODER,
        {
            "transformers, 1 process": ALONE,
            "DeepSpeed AutoTP": Entry("autotp", 2),
            "transformers tp_plan": Entry("transformers-tp", 2),
            "ours": Entry("ours", 2, TWO_RANKS),
            "ours, sequence parallel": Entry("ours", 2, {**TWO_RANKS, "sequence": True}),
            "ours, shared memory": SHARED,
        },
        (
            Target("ours", "DeepSpeed AutoTP", 1.6),
            Target("ours", "transformers tp_plan", 1.4),
            Target("ours", "transformers, 1 process", 0.95),
            Target("ours, sequence parallel", "DeepSpeed AutoTP", 1.6),
        ),
    ),
    "small": Case(
        "a model of 8 M parameters, tensor parallel on 2 ranks",
        SMALL,
        {"transformers, 1 process": ALONE, "ours": Entry("ours", 2, TWO_RANKS), "ours, shared memory": SHARED},
        steps=3,
    ),
    **{
        f"zero{stage}": Case(
            f"ZeRO-{stage} on 2 ranks",
            DECODER,
            {
                "DeepSpeed, transformers": Entry("deepspeed", 2, {"zero": stage}),
                "ours": Entry("ours", 2, {"zero": stage}),
            },
            (Target("ours", "DeepSpeed, transformers", 1.1),) if stage != 2 else (),
        )
        for stage in (1, 2, 3)
    },
    "pp2": Case(
        "pipeline of 2 ranks, 4 micro-batches",
        DECODER,
        {"transformers, 1 process": ALONE, "ours": Entry("ours", 2, {"pipeline": 2, "micro_batch": 1})},
        note="Two stages are idle for 1 of 5 time slots, so the bound is 0.8 of the speed of both cores.",
    ),
    "vocabulary": Case(
        "a vocabulary of 128,000",
        LARGE_VOCABULARY,
        {"transformers": ALONE, "ours": Entry("ours"), "ours, tp 2": Entry("ours", 2, TWO_RANKS)},
        (
            Target("ours", "transformers", 1.3),
            Target("ours", "transformers", 0.65, "memory"),
            Target("ours, tp 2", "transformers", 0.4, "memory"),
        ),
    ),
    "long2k": Case(
        "sequences of 2,048 tokens, recomputation",
        replace(DECODER, batch=1, seq_length=2048, recompute=True),
        {"transformers": ALONE, "ours": Entry("ours")},
    ),
    "long8k": Case(
        "sequences of 8,192 tokens, recomputation, half the layers",
        HALF_THE_LAYERS,
        {"transformers": ALONE, "ours": Entry("ours")},
        (Target("ours", "transformers", 0.5, "memory"), Target("ours", "transformers", 1.0)),
    ),
    "context8k": Case(
        "a sequence of 8,192 tokens on 2 ranks, recomputation, half the layers, a vocabulary of 8,192",
        EIGHT_K,
        DIVIDED_SEQUENCE,
        DIVIDED_TARGETS,
        note=ABOUT_ULYSSES,
    ),
    "context32k": Case(
        "a sequence of 32,768 tokens on 2 ranks, recomputation, one layer, a vocabulary of 8,192",
        THIRTY_TWO_K,
        DIVIDED_SEQUENCE,
        DIVIDED_TARGETS,
        note=ABOUT_ULYSSES,
    ).only_targets(),
    "bert": Case(
        "BERT",
        Work(model=BERT),
        {"transformers": ALONE, "ours": Entry("ours"), "ours, tp 2": Entry("ours", 2, TWO_RANKS)},
        note="The limit counts the output head at every position, as transformers computes it. Ours computes it only "
        "at masked tokens, so its fraction of the limit can exceed 100 %.",
    ),
    "t5": Case(
        "T5",
        Work(model=T5),
        {"transformers": ALONE, "ours": Entry("ours"), "ours, tp 2": Entry("ours", 2, TWO_RANKS)},
    ),
    "moe": Case(
        "a mixture of 8 experts, 2 for each token",
        EXPERTS,
        {
            "transformers": Entry("transformers", options={"experts": "grouped_mm"}),
            "transformers, eager experts": Entry("transformers", options={"experts": "eager"}),
            "ours": Entry("ours"),
        },
        (Target("ours", "transformers", 1.1), Target("ours", "transformers, eager experts", 1.1)),
    ),
    "moe2": Case(
        "a mixture of 8 experts on 2 ranks",
        EXPERTS,
        {
            "transformers, 1 process": Entry("transformers", options={"experts": "grouped_mm"}),
            "DeepSpeed, transformers": Entry("deepspeed", 2, {"zero": 1, "experts": "grouped_mm"}),
            "DeepSpeed AutoEP": Entry("autoep", 2),
            "ours, experts over data": Entry("ours", 2, {"expert": 2, "zero": 1}),
            "ours, experts over tensor": Entry("ours", 2, {**TWO_RANKS, "sequence": True}),
        },
        (
            Target("ours, experts over data", "DeepSpeed, transformers", 1.2),
            Target("ours, experts over data", "DeepSpeed AutoEP", 1.2),
        ),
        note="AutoEP of DeepSpeed 0.19.8 does not start with transformers 5.23, because `get` of a registry of its has "
        "lost an argument; the bench gives it back.",
    ),
    "start": Case(
        "from the command to the first step, a directory of 1 GB on 2 ranks",
        replace(
            DECODER,
            model={
                **LLAMA,
                "vocab_size": 4096,
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 15,
                "num_attention_heads": 16,
                "num_key_value_heads": 8,
            },
        ),
        {
            "from_pretrained alone": Entry("from-pretrained"),
            "ours, tp 2, ZeRO-0": Entry("start", options={"tensor": 2, "zero": 0}),
            "ours, tp 2, ZeRO-1": Entry("start", options={"tensor": 2, "zero": 1}),
        },
        (
            Target("ours, tp 2, ZeRO-0", "from_pretrained alone", 1 / 1.5),
            Target("ours, tp 2, ZeRO-1", "from_pretrained alone", 1 / 1.5),
        ),
        unit="GB/s",
        note="from_pretrained memory-maps the weights and returns before all are read; the others have loaded them and "
        "are ready to train.",
    ),
    "convert": Case(
        "converting a directory of 220 MB",
        DECODER,
        {"cp": Entry("cp"), "ours": Entry("rewrite")},
        unit="GB/s",
        steps=3,
    ),
    "prepare": Case(
        "tokenizing 10 MB of text",
        Work(size_bytes=10_000_000),
        {"a loop": Entry("loop"), "datasets.map": Entry("map"), "ours": Entry("prepare")},
    ),
}
