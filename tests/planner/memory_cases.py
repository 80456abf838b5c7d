"""Runs whose memory is planned and measured: families, layouts, stages of ZeRO, recomputation, offload.

Models are large enough that parameters and activations are nearly all of the memory, and small enough for a CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_ds.config import EngineConfig, build_section
from megatron_ds.planner.plan_input import Machines, PlanInput, Rows
from megatron_ds.runtime import LoadedModel, load_model
from megatron_ds.runtime.setup import plan_engine

VOCAB = 1024
_DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "tie_word_embeddings": False,
}
MODELS: Mapping[str, Mapping[str, Any]] = {
    "llama": {"model_type": "llama", **_DECODER},
    "qwen3-tied": {"model_type": "qwen3", **_DECODER, "head_dim": 16, "tie_word_embeddings": True},
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": VOCAB,
        "n_embd": 128,
        "n_layer": 4,
        "n_head": 8,
        "n_positions": 512,
        "resid_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "attn_pdrop": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    "bert": {
        "model_type": "bert",
        "architectures": ["BertForMaskedLM"],
        "vocab_size": VOCAB,
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "max_position_embeddings": 512,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    },
    "t5": {
        "model_type": "t5",
        "vocab_size": VOCAB,
        "d_model": 128,
        "d_kv": 16,
        "d_ff": 352,
        "num_layers": 4,
        "num_decoder_layers": 4,
        "num_heads": 8,
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.0,
        "tie_word_embeddings": True,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
    },
    "mixtral": {
        "model_type": "mixtral",
        **_DECODER,
        "intermediate_size": 176,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "output_router_logits": False,
    },
}
TARGETS = 64  # positions of a decoder with inputs of its own


@dataclass(frozen=True)
class MemoryCase:
    """A run.

    Attributes:
        name: for messages.
        model: key of `MODELS`.
        tensor, pipeline, data, context, expert, sequence: its layout.
        zero: stage of ZeRO.
        precision: "fp32" or "bf16"; DeepSpeed has no fp16 on a CPU.
        micro_batches: of a step on each data rank; `micro_batch`: samples of each.
        seq_length: positions of a sample.
        optimizer: name of the optimizer.
        section: further keys of `zero_optimization`.
        settings: further fields of the engine's config.
        deepspeed: further sections of the DeepSpeed JSON.
        freeze: patterns of names of tensors that are not trained.
        peft: fields of a peft config, whose adapters are trained.
        directory: of the model with its weights, which adapters need; None = weights are random.
    """

    name: str
    model: str = "llama"
    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    context: int = 1
    expert: int | None = None
    sequence: bool = False
    zero: int = 1
    precision: str = "fp32"
    micro_batches: int = 2
    micro_batch: int = 2
    seq_length: int = 128
    optimizer: str = "adamw"
    section: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    deepspeed: Mapping[str, Any] = field(default_factory=dict)
    freeze: tuple[str, ...] = ()
    peft: Mapping[str, Any] | None = None
    directory: str | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tensor * self.pipeline * self.data * self.context

    @property
    def config(self) -> EngineConfig:
        """The engine's config."""
        zero = {"stage": self.zero, "reduce_bucket_size": 300_000, **self.section}
        context = {"context": {"size": self.context}} if self.context > 1 else {}
        layout = {"tensor": self.tensor, "pipeline": self.pipeline, "expert": self.expert, "sequence": self.sequence}
        fields = {
            "parallel": {**layout, **context},
            "deepspeed": {
                "zero_optimization": zero,
                **({self.precision: {"enabled": True}} if self.precision != "fp32" else {}),
                **self.deepspeed,
            },
            "optimizer": {"name": self.optimizer, "lr": 1e-4, "grad_clip": 1.0},
            "global_batch_size": self.micro_batch * self.micro_batches * self.data,
            "micro_batch_size": self.micro_batch,
            **self.settings,
        }
        return build_section(EngineConfig, fields, keep=("optimizer",))

    @property
    def rows(self) -> Rows:
        """The rows of its data."""
        if self.model == "t5":
            return Rows(self.seq_length, TARGETS, ("input_ids", "decoder_input_ids", "targets"))
        return Rows(self.seq_length, labelled=0.25 if self.model == "bert" else 1.0)

    def plan_input(self) -> PlanInput:
        """Return what its plan is made from."""
        model = self.load()
        engine = plan_engine(self.config, model.hf, self.world_size, "cpu", trains_part=bool(model.frozen))
        machines = Machines(1, self.world_size, "cpu")
        return PlanInput(model.layers, model.hf.core, engine, self.rows, machines, frozen=model.frozen)

    def load(self) -> LoadedModel:
        """Return the model."""
        return load_model(self.directory or dict(MODELS[self.model]), freeze=self.freeze, peft=self.peft)

    def save(self, directory: str) -> None:
        """Save the model with random weights, as `directory` has it."""
        from transformers import AutoConfig, AutoModelForCausalLM

        AutoModelForCausalLM.from_config(AutoConfig.for_model(**MODELS[self.model])).save_pretrained(directory)

    def batch(self) -> dict[str, Tensor]:
        """Return a global batch."""
        generator, samples = torch.Generator().manual_seed(1), self.config.global_batch_size
        ids = torch.randint(3, VOCAB, (samples, self.seq_length), generator=generator)
        if self.model == "t5":
            targets = torch.randint(3, VOCAB, (samples, TARGETS), generator=generator)
            return {"input_ids": ids, "decoder_input_ids": targets.clone(), "targets": targets}
        targets = ids.clone()
        targets[:, round(self.rows.labelled * self.seq_length) :] = -100
        return {"input_ids": ids, "targets": targets}


_COMPILE = {"compile": True}
_FULL, _SELECTIVE = {"recompute": "full"}, {"recompute": "selective"}
_OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
_WEIGHTS_TOO = {**_OFFLOAD, "offload_param": {"device": "cpu"}}
_FREEZE = ("model.embed_tokens.*", "model.layers.0.*", "model.layers.1.*")
_LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
_DIVIDED = {"stage3_param_persistence_threshold": 1000, "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": 50_000}  # fmt: skip
_OVERLAP = {"overlap_comm": True}
_EMA = {"ema": {"decay": 0.99}}
_FP32_SUMS, _BF16_SUMS = ({"data_types": {"grad_accum_dtype": dtype}} for dtype in ("fp32", "bf16"))
_Case = MemoryCase


def _short(name: str, model: str = "llama", **fields: Any) -> MemoryCase:
    """A case with so few tokens that weights, gradients and state are nearly all of the memory."""
    section = {"reduce_bucket_size": 20_000, **fields.pop("section", {})}
    return MemoryCase(name, model, micro_batch=1, seq_length=16, section=section, **fields)


SAMPLE = (
    _Case("llama bf16 tensor 2 sequence zero 1", tensor=2, sequence=True, precision="bf16", settings=_SELECTIVE),
    _Case("gpt2 zero 2 data 2", "gpt2", zero=2, data=2, micro_batches=3),
    _Case("qwen3-tied pipeline 2", "qwen3-tied", pipeline=2, micro_batches=4, micro_batch=1),
    _Case("llama zero 3 data 2 full", zero=3, data=2, settings=_FULL),
    _Case("bert zero 1 offload", "bert", data=2, section=_OFFLOAD),
    _Case("mixtral expert 2", "mixtral", data=2, expert=2, zero=1, precision="bf16"),
    _Case(
        "llama lora bf16 zero 3 divided full",
        zero=3,
        data=2,
        precision="bf16",
        settings=_FULL,
        section=_DIVIDED,
        peft=_LORA,
    ),
    _short("llama muon short bf16 zero 1", data=2, precision="bf16", optimizer="muon"),
    _short("llama short bf16 zero 2", zero=2, data=2, precision="bf16"),
    _Case("llama one micro-batch bf16", micro_batches=1, precision="bf16"),
    _Case("llama averaged weights zero 3", zero=3, data=2, settings=_EMA),
)
MORE = (
    _Case("llama zero 0", zero=0, data=2),
    _Case("llama one rank zero 0", zero=0, micro_batches=1),
    _Case("llama one rank zero 1"),
    _Case("llama one rank zero 2", zero=2),
    _Case("llama one rank zero 3", zero=3),
    _Case("llama one micro-batch zero 1", data=2, micro_batches=1),
    _Case("llama one micro-batch zero 2", data=2, zero=2, micro_batches=1),
    _Case("llama one micro-batch bf16 zero 1", data=2, micro_batches=1, precision="bf16"),
    _Case("llama three micro-batches bf16 zero 1", data=2, micro_batches=3, precision="bf16"),
    _Case("llama one micro-batch zero 3", data=2, zero=3, micro_batches=1),
    _Case("llama one micro-batch bf16 zero 2", data=2, zero=2, micro_batches=1, precision="bf16"),
    _Case("llama one micro-batch bf16 zero 3", data=2, zero=3, micro_batches=1, precision="bf16"),
    _Case("llama pipeline 2 one micro-batch bf16", pipeline=2, micro_batches=1, precision="bf16"),
    _Case("llama large bucket zero 1", data=2, section={"reduce_bucket_size": 2_000_000}),
    _Case("llama large bucket zero 2", data=2, zero=2, section={"reduce_bucket_size": 2_000_000}),
    _Case("llama small bucket zero 2", data=2, zero=2, section={"reduce_bucket_size": 20_000}),
    _Case("llama data 4 zero 2", data=4, zero=2),
    _Case("llama bf16 one rank", precision="bf16"),
    _Case("llama bf16 data 2 zero 1", data=2, precision="bf16"),
    _Case("llama bf16 data 2 zero 2", data=2, zero=2, precision="bf16"),
    _Case("llama bf16 data 2 zero 3", data=2, zero=3, precision="bf16"),
    _Case("llama zero 3 divided", data=2, zero=3, section={"stage3_param_persistence_threshold": 1000,
          "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 50_000}),
    _Case("llama zero 3 few gathered", data=2, zero=3, section={"stage3_param_persistence_threshold": 1000,
          "stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 200_000}),
    _Case("llama zero 3 kept for a while", data=2, zero=3, section={"stage3_param_persistence_threshold": 1000,
          "stage3_max_reuse_distance": 300_000, "stage3_prefetch_bucket_size": 100_000}),
    _Case("llama zero 3 divided full", data=2, zero=3, settings=_FULL, section={
          "stage3_param_persistence_threshold": 1000, "stage3_max_reuse_distance": 0,
          "stage3_prefetch_bucket_size": 50_000}),
    _Case("llama full", settings=_FULL, micro_batch=4),
    _Case("llama selective", settings=_SELECTIVE, micro_batch=4),
    _Case("llama full, attention kept", settings={**_FULL, "keep_attention": True}, micro_batch=4),
    _Case("llama tiles", settings={"mlp_tile_tokens": 128}, micro_batch=4),
    _Case("llama full, inputs on the host", settings={**_FULL, "offload_activations": True}, micro_batch=4),
    _Case("llama tensor 2", tensor=2, zero=0),
    _Case("llama tensor 2 sequence", tensor=2, sequence=True),
    _Case("llama tensor 2 sequence full", tensor=2, sequence=True, settings=_FULL),
    _Case("llama tensor 2 data 2 zero 3", tensor=2, data=2, zero=3),
    _Case("llama context 2", context=2, zero=2),
    _Case("llama context 2 full zero 1", context=2, settings=_FULL),
    _Case("llama pipeline 2 bf16", pipeline=2, micro_batches=4, precision="bf16"),
    _Case("llama pipeline 4 fp32", pipeline=4, micro_batches=6, micro_batch=1),
    _Case("llama pipeline 2 full", pipeline=2, micro_batches=4, settings=_FULL),
    _Case("llama pipeline 2 tensor 2 bf16", pipeline=2, tensor=2, sequence=True, micro_batches=4, precision="bf16"),
    _Case("llama pipeline 2 data 2", pipeline=2, data=2, micro_batches=3),
    _Case("llama zero 1 offload bf16", data=2, precision="bf16", section=_OFFLOAD),
    _Case("llama zero 2 offload", data=2, zero=2, section=_OFFLOAD),
    _Case("llama zero 2 offload bf16", data=2, zero=2, precision="bf16", section=_OFFLOAD),
    _Case("llama zero 3 offload", data=2, zero=3, section=_OFFLOAD),
    _Case("llama zero 3 offload weights bf16", data=2, zero=3, precision="bf16", section=_WEIGHTS_TOO),
    _Case("llama averaged weights", data=2, settings={"ema": {"decay": 0.99}}),
    _Case("llama frozen zero 1", data=2, freeze=_FREEZE, precision="bf16"),
    _Case("llama frozen zero 3", data=2, zero=3, freeze=_FREEZE, settings=_FULL),
    _Case("llama sgd", data=2, optimizer="sgd"),
    _Case("llama lion zero 2", data=2, zero=2, optimizer="lion"),
    _Case("gpt2 tensor 2 bf16", "gpt2", tensor=2, precision="bf16"),
    _Case("gpt2 pipeline 2", "gpt2", pipeline=2, micro_batches=4),
    _Case("qwen3-tied data 2 zero 3", "qwen3-tied", data=2, zero=3),
    _Case("bert tensor 2 sequence", "bert", tensor=2, sequence=True, zero=2),
    _Case("bert full zero 3", "bert", data=2, zero=3, settings=_FULL),
    _Case("t5 bf16 zero 2", "t5", zero=2, data=2, precision="bf16"),
    _Case("t5 data 2 zero 1", "t5", data=2),
    _Case("t5 pipeline 2 bf16", "t5", pipeline=2, micro_batches=4, precision="bf16"),
    _Case("t5 tensor 2 full", "t5", tensor=2, settings=_FULL),
    _Case("mixtral one rank", "mixtral", zero=0),
    _Case("mixtral tensor 2 sequence", "mixtral", tensor=2, sequence=True),
    _Case("mixtral expert 2 zero 2", "mixtral", data=2, expert=2, zero=2),
    _Case("mixtral expert 2 zero 3", "mixtral", data=2, expert=2, zero=3),
    _Case("mixtral full", "mixtral", data=2, zero=1, settings=_FULL),
    _Case("llama lora zero 0", zero=0, data=2, peft=_LORA),
    _Case("llama lora zero 1", data=2, peft=_LORA),
    _Case("llama lora bf16 zero 1", data=2, precision="bf16", peft={**_LORA, "lora_dropout": 0.1}),
    _Case("llama lora zero 2 full", zero=2, data=2, settings=_FULL, peft=_LORA),
    _Case("llama lora bf16 zero 2", zero=2, data=2, precision="bf16", peft=_LORA),
    _Case("llama lora zero 3", zero=3, data=2, peft=_LORA),
    _Case("llama lora tensor 2 sequence", tensor=2, sequence=True, peft=_LORA),
    _Case("llama lora pipeline 2", pipeline=2, micro_batches=4, peft=_LORA),
    _short("llama lora short bf16 zero 1", data=2, precision="bf16", peft=_LORA),
    _short("llama lora short zero 3 divided full", zero=3, data=2, settings=_FULL, section=_DIVIDED, peft=_LORA),
    _Case("llama muon zero 0", zero=0, tensor=2, optimizer="muon"),
    _Case("llama muon zero 1", data=2, optimizer="muon"),
    _Case("llama muon bf16 zero 1", data=2, precision="bf16", optimizer="muon"),
    _Case("llama muon zero 2", zero=2, data=2, optimizer="muon"),
    _Case("llama muon zero 3", zero=3, data=2, optimizer="muon"),
    _Case("llama muon pipeline 2", pipeline=2, micro_batches=4, optimizer="muon"),
    _short("llama muon short zero 0", zero=0, tensor=2, optimizer="muon"),
    _short("llama muon short zero 2", zero=2, data=2, optimizer="muon"),
    _short("llama muon short zero 3", zero=3, data=2, optimizer="muon"),
    _Case("llama adafactor zero 0", zero=0, tensor=2, optimizer="adafactor"),
    _Case("llama adafactor zero 1", data=2, optimizer="adafactor"),
    _Case("llama adafactor zero 2", zero=2, data=2, optimizer="adafactor"),
    _short("llama adafactor short zero 0", zero=0, tensor=2, optimizer="adafactor"),
    _short("llama adafactor short bf16 zero 1", data=2, precision="bf16", optimizer="adafactor"),
    _short("llama adafactor short zero 2", zero=2, data=2, optimizer="adafactor"),
    _short("llama adafactor short zero 3", zero=3, data=2, optimizer="adafactor"),
    _short("llama short zero 0", zero=0, data=2),
    _short("llama short zero 1", data=2),
    _short("llama short bf16 zero 1", data=2, precision="bf16"),
    _short("llama short zero 2", zero=2, data=2),
    _short("llama short zero 3", zero=3, data=2),
    _short("llama short zero 3 divided", zero=3, data=2, section=_DIVIDED),
    _short("llama short bf16 zero 3 all-reduce", zero=3, data=2, precision="bf16",
           section={**_DIVIDED, "stage3_use_all_reduce_for_fetch_params": True}),
    _short("llama short zero 3 two divisions", zero=3, data=4, section={**_DIVIDED, "zero_hpz_partition_size": 2}),
    _short("llama short lion zero 2", zero=2, data=2, optimizer="lion"),
    _short("llama short sgd zero 1", data=2, optimizer="sgd"),
    _Case("llama overlap zero 1", data=2, section=_OVERLAP),
    _Case("llama overlap bf16 zero 1", data=2, precision="bf16", section=_OVERLAP),
    _Case("llama overlap zero 2", zero=2, data=2, section=_OVERLAP),
    _Case("llama overlap bf16 zero 2", zero=2, data=2, precision="bf16", section=_OVERLAP),
    _Case("llama no overlap zero 3", zero=3, data=2, section={"overlap_comm": False}),
    _short("llama short overlap zero 2", zero=2, data=2, section=_OVERLAP),
    _Case("llama averaged weights zero 0", zero=0, data=2, settings=_EMA),
    _Case("llama averaged weights bf16 zero 1", data=2, precision="bf16", settings=_EMA),
    _Case("llama averaged weights zero 2", zero=2, data=2, settings=_EMA),
    _Case("llama averaged weights offload", data=2, section=_OFFLOAD, settings=_EMA),
    _short("llama short averaged weights zero 2", zero=2, data=2, settings=_EMA),
    _Case("llama fp32 sums bf16 zero 2", zero=2, data=2, precision="bf16", micro_batches=3, deepspeed=_FP32_SUMS),
    _Case("llama bf16 sums bf16 zero 2", zero=2, data=2, precision="bf16", micro_batches=3, deepspeed=_BF16_SUMS),
    _Case("llama bf16 sums bf16 zero 1", data=2, precision="bf16", micro_batches=3, deepspeed=_BF16_SUMS),
    _short("llama short fp32 sums bf16 zero 2", zero=2, data=2, precision="bf16", deepspeed=_FP32_SUMS),
    _Case("qwen3-tied pipeline 2 data 2 bf16", "qwen3-tied", pipeline=2, data=2, micro_batches=4, precision="bf16"),
    _short("qwen3-tied short pipeline 2 data 2", "qwen3-tied", pipeline=2, data=2, micro_batches=4),
    _short("gpt2 short pipeline 2 bf16", "gpt2", pipeline=2, data=2, micro_batches=4, precision="bf16"),
    _short("mixtral muon short", "mixtral", data=2, optimizer="muon"),
    _short("mixtral muon short expert 2 zero 3", "mixtral", zero=3, data=2, expert=2, optimizer="muon"),
    _short("mixtral adafactor short", "mixtral", data=2, optimizer="adafactor"),
    _short("llama muon short tensor 2 data 2 zero 3", zero=3, tensor=2, data=2, optimizer="muon"),
    _short("llama muon short fp32 one rank", zero=0, optimizer="muon"),
    _short("llama muon short offload", data=2, optimizer="muon", section=_OFFLOAD),
    _short("llama lion short bf16 zero 1", data=2, precision="bf16", optimizer="lion"),
    _short("llama lion short zero 0", zero=0, data=2, optimizer="lion"),
    _short("llama lion short zero 3", zero=3, data=2, optimizer="lion", section=_DIVIDED),
    _short("llama averaged weights short bf16 zero 1", data=2, precision="bf16", settings=_EMA),
    _Case("llama frozen zero 3 divided full", zero=3, data=2, freeze=("model.layers.2.*", "model.layers.3.mlp.*"),
          settings=_FULL, section=_DIVIDED),
    _Case("llama compiled", settings=_COMPILE),
    _Case("llama compiled bf16 data 2 zero 2", data=2, zero=2, precision="bf16", settings=_COMPILE),
    _Case("llama compiled tensor 2 sequence", tensor=2, sequence=True, settings=_COMPILE),
    _Case("llama compiled data 2 zero 3 full", data=2, zero=3, settings={**_COMPILE, **_FULL}),
    _Case("gpt2 compiled bf16 zero 1", "gpt2", precision="bf16", settings=_COMPILE),
    _Case("llama compiled one micro-batch bf16 zero 1", micro_batches=1, precision="bf16", settings=_COMPILE),
    _Case("bert compiled bf16 tensor 2", "bert", tensor=2, precision="bf16", settings=_COMPILE),
    _Case("t5 compiled pipeline 2 bf16", "t5", pipeline=2, micro_batches=4, precision="bf16", settings=_COMPILE),
    _Case("mixtral compiled bf16", "mixtral", precision="bf16", settings=_COMPILE),
)  # fmt: skip
