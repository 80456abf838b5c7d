"""The setting of a trace: everything besides the layers that their operations and memory depend on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_ds.config import ContextPlan
from megatron_ds.layers.kernels.select import AUTO, Choice


@dataclass(frozen=True)
class TraceSetting:
    """One rank's place in a layout, its micro-batch, and the options of its layers.

    Attributes:
        seq_length: S, of whole rows.
        micro_batch_size: B, rows of a micro-batch.
        target_length: T, of a separate decoder; None = S.
        columns: columns of the batch besides ids and labels, such as "attention_mask" or "position_ids".
        documents: documents of equal length in each row, where `columns` has "position_ids".
        num_labels: L, labels of the model's head; None = it has no such head.
        labelled: share of the positions that carry loss, such as the rate of masked tokens.
        precision: "fp32", "bf16" or "fp16".
        device_type: "cpu", or "cuda" for GPUs.
        kernels: see `layers.kernels.select_kernels`; "auto" on "cuda" stands for our kernels and fused attention, whose
            installation is not needed here.
        tensor: t, ranks along the tensor axis; `sequence`: Megatron's sequence parallelism.
        context: the communication of the ranks that divide each sequence.
        expert: e, ranks that divide the experts of a layer; None = the tensor ranks do.
        tensor_rank, context_rank: this rank's index along these axes.
        neighbours: tensor ranks of CPUs communicate through the memory of one machine, under the name "neighbours".
        recompute: "none", "selective" or "full".
        offload_activations: inputs of recomputed blocks are kept in host memory.
        keep_attention: outputs of the attention kernels of recomputed blocks are kept.
        mlp_tile_tokens: see `BuildContext`.
        compile: blocks are fused by torch.compile.
        router_aux_loss, router_z_loss: see `RouterSettings`.
        zero_stage: of DeepSpeed, on which depends where gradients are added up, and whether passes of modules are
            recorded.
        trains: False = forward passes without gradients.
        frozen: names of parameters that are not trained.
    """

    seq_length: int
    micro_batch_size: int = 1
    target_length: int | None = None
    columns: tuple[str, ...] = ()
    documents: int = 1
    num_labels: int | None = None
    labelled: float = 1.0
    precision: str = "bf16"
    device_type: Literal["cpu", "cuda"] = "cuda"
    kernels: Choice = AUTO
    tensor: int = 1
    sequence: bool = False
    context: ContextPlan = field(default_factory=ContextPlan)
    expert: int | None = None
    tensor_rank: int = 0
    context_rank: int = 0
    neighbours: bool = False
    recompute: str = "none"
    offload_activations: bool = False
    keep_attention: bool = False
    mlp_tile_tokens: int | None = None
    compile: bool = False
    router_aux_loss: float | None = None
    router_z_loss: float = 0.0
    zero_stage: int = 1
    trains: bool = True
    frozen: frozenset[str] = frozenset()

    @property
    def adds_gradients_in_products(self) -> bool:
        """True if products add gradients of matrices to fp32 sums, which autograd then does not see.

        See `engine.gradient_sums`.
        """
        return self.device_type == "cuda" and self.precision == "bf16" and self.zero_stage == 1 and self.trains
