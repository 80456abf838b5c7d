"""Memory of long sequences: with recomputation and tiles, 64k tokens take less than 8k do without.

Counted on torch's meta device, where tensors have shapes and no values: the most bytes of tensors that live at one time
in a forward and backward pass, without parameters. Attention is torch's flash operation, as on a CPU, whose memory
grows linearly. A sweep measures the same in the memory of a process.

Seen, in MiB: 8k tokens 335 without any of it, 131 with recomputation; 64k tokens 1,028 with recomputation, 293 with
tiles too, 262 with inputs of blocks in host memory too. With four times the width of the MLP: 3,338 and, in tiles, 331.
The process of the sweep grows by 1,029 with 8k tokens, and by 585 with 64k and tiles.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from megatron_ds.hf.config import read_model
from megatron_ds.layers.cross_entropy import LOGITS_BYTES, VocabShard, head_loss
from megatron_ds.layers.host_offload import HostOffload
from megatron_ds.layers.recompute import Recompute
from megatron_ds.models.context import BuildContext
from megatron_ds.models.sequential import SequentialModel, positions_of
from megatron_ds.monitor.memory import MemoryMeter
from megatron_ds.parallel.grid import Axis
from megatron_ds.planner.trace.storages import LiveStorages
from tests.ranks import run_alone

META = torch.device("meta")
SHORT, LONG, TILE = 2**13, 2**16, 1024
LAYERS, HIDDEN, FLOAT_BYTES, MIB = 4, 64, 4, 2**20
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 1024,
    "hidden_size": HIDDEN,
    "intermediate_size": 512,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": LONG,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


@pytest.fixture(autouse=True)
def logits_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device stands for a GPU, whose chunks of logits are larger than the rest of this model."""
    monkeypatch.setitem(LOGITS_BYTES, "cuda", LOGITS_BYTES["cpu"])


class UncountedCopies:
    """Copies whose host memory is not counted."""

    def to_host(self, x: Tensor) -> Tensor:
        with _disable_current_modes():
            return torch.empty_like(x)

    def begin_fetch(self, host: Tensor) -> tuple[Tensor, None]:
        return host.clone(), None

    def wait(self, event: None) -> None: ...


def flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What torch runs on a CPU; on the meta device it would make all scores."""
    assert attn_mask is None and is_causal
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return attend(q, k, v, dropout_p, is_causal, scale=scale)[0]


def _run(changes: dict[str, Any], length: int, device: torch.device, **options: Any) -> None:
    """A forward and backward pass on one sequence, all of whose positions have labels."""
    core = read_model({**CONFIG, **changes}).core
    with device:
        model = SequentialModel(core.build_layers(BuildContext(**options)))
        if device != META:
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.02)
        ids, labelled = torch.zeros(1, length, dtype=torch.int64), torch.arange(length)
    model({"input_ids": ids}, {"targets": ids, positions_of("targets"): labelled}).sum().backward()


def _peaks(runs: list[tuple[dict[str, Any], int, str, int | None, bool]]) -> list[int]:
    F.scaled_dot_product_attention = flash
    peaks = []
    for changes, length, mode, tile, offloads in runs:
        recompute = Recompute(mode, offload=HostOffload(UncountedCopies()) if offloads else None)
        with LiveStorages() as live:
            _run(changes, length, META, recompute=recompute, mlp_tile_tokens=tile)
        peaks.append(live.peak_bytes)
    return peaks


def test_64k_tokens_take_less_than_8k_without_tiles() -> None:
    wide = {"intermediate_size": 2048}
    plain, recomputed, tiled, offloaded, tiled_wide = run_alone(
        _peaks,
        [
            ({}, SHORT, "none", None, False),
            ({}, LONG, "full", None, False),
            ({}, LONG, "full", TILE, False),
            ({}, LONG, "full", TILE, True),
            (wide, LONG, "full", TILE, False),
        ],
    )
    tensor = LONG * HIDDEN * FLOAT_BYTES
    assert tiled < plain < recomputed
    # Inputs of the blocks, and what one block keeps of attention, norms and residual sums; one tile; gradients.
    assert tiled <= (LAYERS + 14) * tensor + 8 * MIB
    assert offloaded <= tiled - (LAYERS - 2) * tensor + MIB, "inputs of two blocks are on the device"
    assert tiled_wide - tiled < 50 * MIB, "those of all tokens, not of a tile, are 2,309 MiB more"


def _head_peak(length: int) -> int:
    """The most bytes while the loss of a head is computed and differentiated."""
    with META:
        weight = torch.empty(50000, HIDDEN, requires_grad=True)
        hidden, targets = torch.empty(length, 1, HIDDEN, requires_grad=True), torch.zeros(length, 1, dtype=torch.int64)
        labelled = torch.arange(length)
    with LiveStorages() as live:
        head_loss(hidden, VocabShard(weight, None, len(weight), Axis()), targets, labelled).backward()
    return live.peak_bytes


def test_the_head_never_has_more_than_one_chunk_of_logits() -> None:
    short, long = run_alone(lambda: [_head_peak(length) for length in (SHORT, LONG)])
    per_token = HIDDEN * FLOAT_BYTES + 8  # a gradient, and an index of a label
    assert short < 3 * LOGITS_BYTES["cpu"]
    assert long - short < 2 * (LONG - SHORT) * per_token


NARROW = {"intermediate_size": 2048, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8}
"""So that attention to 64k tokens takes a core a minute."""


@contextmanager
def _growth() -> Iterator[list[int]]:
    """Append the growth of this process to its largest size within the block, in bytes."""
    found: list[int] = []
    meter = MemoryMeter(torch.device("cpu"))
    before = meter.take().used_bytes
    yield found
    found.append(meter.take().used_bytes - before)


def _measured(length: int, mode: str, tile: int | None) -> int:
    torch.set_num_threads(1)
    _run(NARROW, 256, torch.device("cpu"))  # code is loaded, and memory that is freed again taken
    with _growth() as found:
        _run(NARROW, length, torch.device("cpu"), recompute=Recompute(mode), mlp_tile_tokens=tile)
    return found[0]


@pytest.mark.sweep
def test_64k_tokens_fit_where_8k_did_in_a_process() -> None:
    plain = run_alone(_measured, SHORT, "none", None)
    tiled = run_alone(_measured, LONG, "full", TILE, timeout_s=900.0)
    assert tiled < plain, (tiled / MIB, plain / MIB)
