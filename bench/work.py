"""The work of a case, the same for all contestants: a model, a batch, a precision."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MASKED_MODELS = ("bert",)
SEQ2SEQ_MODELS = ("t5",)
MASK_EVERY = 7  # masks about 15 % of the tokens, as BERT does


@dataclass(frozen=True)
class Work:
    """A model to train, or files to handle.

    Attributes:
        model: fields of a Hugging Face config, including `model_type`.
        batch, seq_length: B and S of a global batch; a T5 has S / 4 targets.
        recompute: recompute the activations of complete blocks in the backward pass.
        dtype: "fp32", or "bf16" with fp32 master weights if the contestant keeps them.
        lr, grad_clip: options of AdamW.
        size_bytes: size of the text to prepare.
    """

    model: dict[str, Any] = field(default_factory=dict)
    batch: int = 4
    seq_length: int = 512
    recompute: bool = False
    dtype: str = "fp32"
    lr: float = 1e-4
    grad_clip: float = 1.0
    size_bytes: int = 0

    @property
    def target_length(self) -> int:
        return self.seq_length // 4 if self.model["model_type"] in SEQ2SEQ_MODELS else 0

    @property
    def tokens(self) -> int:
        """Number of positions per step."""
        return self.batch * (self.seq_length + self.target_length)

    def shrunk(self) -> Work:
        """Return a small version that takes seconds, to test the bench itself."""
        small = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_local_experts": 4,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "d_model": 32,
            "d_ff": 64,
            "d_kv": 8,
            "num_layers": 2,
            "num_heads": 4,
            "vocab_size": 256,
        }
        model = {name: min(value, small[name]) if name in small else value for name, value in self.model.items()}
        return replace(self, model=model, seq_length=32, size_bytes=min(self.size_bytes, 100_000))

    def batches(self) -> dict[str, Tensor]:
        """Return a fixed global batch with transformers' column names; every position is attended to."""
        generator = torch.Generator().manual_seed(5)
        shape, vocab = (self.batch, self.seq_length), self.model["vocab_size"]
        ids = torch.randint(3, vocab, shape, generator=generator)
        if self.model["model_type"] in MASKED_MODELS:
            labels = torch.full(shape, -100)
            labels[:, ::MASK_EVERY] = ids[:, ::MASK_EVERY]
            return {"input_ids": ids, "labels": labels}
        if self.target_length:
            labels = torch.randint(3, vocab, (self.batch, self.target_length), generator=generator)
            return {"input_ids": ids, "labels": labels}
        return {"input_ids": ids, "labels": ids.clone()}


@dataclass(frozen=True)
class Spec:
    """Input of a contestant's process.

    Attributes:
        runner: a name in `contestant.RUNNERS`.
        world: number of ranks.
        options: options of the runner: degrees, ZeRO stage, switches.
        work: the work of the case.
        folder: directory of the model or the text; the contestant may write to a subdirectory of its own.
        device: "cpu" or "cuda".
        environment: variables that the process starts with, besides those of this one.
    """

    runner: str
    world: int
    options: Mapping[str, Any]
    work: Work
    folder: str
    device: str
    environment: Mapping[str, str] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: str) -> Spec:
        found = json.loads(Path(path).read_text())
        return cls(**{**found, "work": Work(**found["work"])})


def write_model(work: Work, folder: Path) -> float:
    """Write the randomly initialized model that all contestants start from; returns the FLOPs of a step.

    The FLOPs are counted on transformers' own forward and backward pass on meta tensors: matrix products and attention.
    """
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoConfig, set_seed

    fields = {name: value for name, value in work.model.items() if name != "model_type"}
    config = AutoConfig.for_model(work.model["model_type"], **fields)
    set_seed(3)
    model_class(work).from_config(config).save_pretrained(folder)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        experts = {"experts_implementation": "batched_mm"} if "num_local_experts" in work.model else {}
        model = model_class(work).from_config(config, attn_implementation="eager", **experts)
        batch = {name: torch.empty_like(column, device="meta") for name, column in work.batches().items()}
        logits = model(**_inputs(batch, work)).logits
        logits.sum().backward()
    return float(counter.get_total_flops())


def _inputs(batch: dict[str, Tensor], work: Work) -> dict[str, Tensor]:
    """Return the columns that the logits depend on, without labels, whose loss depends on values."""
    ids = {"input_ids": batch["input_ids"]}
    return {**ids, "decoder_input_ids": batch["labels"]} if work.target_length else ids


def model_class(work: Work) -> Any:
    """Return transformers' model class for the work."""
    import transformers

    kind = work.model["model_type"]
    if kind in MASKED_MODELS:
        return transformers.AutoModelForMaskedLM
    return transformers.AutoModelForSeq2SeqLM if kind in SEQ2SEQ_MODELS else transformers.AutoModelForCausalLM
