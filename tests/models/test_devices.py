"""A forward pass leaves no tensor on the CPU and reads no value on the host: shown on torch's meta device.

A meta tensor has a shape and no values. An operation that mixes it with a CPU tensor raises, and so does one that waits
for values, such as `item` or `nonzero`: on a GPU the first fails and the second makes the host wait in every layer.
"""

import pytest
import torch

from megatron_ds.hf.config import read_model
from megatron_ds.layers.mlp import LEARNED, MLP
from megatron_ds.layers.moe import grouped
from megatron_ds.models.gpt import DecoderConfig
from megatron_ds.models.sequential import SequentialModel
from tests.parity.alone_batches import Batch, make_batch
from tests.parity.packed import draw_rows, packed
from tests.parity.reference import ALL_CONFIGS

META = torch.device("meta")
FIRST_CASES = {config["model_type"]: case for case, config in reversed(ALL_CONFIGS.items())}
OPTIONS = ("gemma2-caps", "mistral", "llama-yarn", "phi3-longrope-beyond")


def run_on_meta(case: str) -> None:
    """Run a model without values on plain, padded and, if it is a decoder, packed columns."""
    core = read_model(dict(ALL_CONFIGS[case])).core
    constants = getattr(core, "moe", None) is not None or getattr(core, "activation", None) in LEARNED
    if not constants:
        model = SequentialModel(core.build_layers()).eval().to(META)
    else:  # as the engine builds it, on its device, where its constants are made; a GPU has grouped products in bf16
        with META:
            model = SequentialModel(core.build_layers()).eval().bfloat16()
    batches = [make_batch(core, padded=padded) for padded in (False, True)]
    if isinstance(core, DecoderConfig):
        columns = packed(draw_rows(3, 0))
        del columns["targets"]
        batches.append(Batch(columns, {}))
    for batch in batches:
        outputs = model({name: column.to(META) for name, column in batch.columns.items()})
        assert outputs and all(output.device == META for output in outputs.values())


@pytest.mark.parametrize("case", sorted({*FIRST_CASES.values(), *OPTIONS}))
def test_nothing_stays_on_the_cpu_or_waits_for_the_device(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the grouped products of a GPU: a loop over experts, as on a CPU, needs their numbers of rows on the host."""
    monkeypatch.setattr(grouped, "_has_grouped_product", lambda left, right: left.dtype == torch.bfloat16)
    run_on_meta(case)


@pytest.mark.parametrize("trap", ["mixed", "read"])
def test_a_trap_is_seen(trap: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = MLP.forward

    def trapped(self: MLP, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        y = forward(self, x, mask)
        return y * torch.ones(y.shape[-1]) if trap == "mixed" else y * y.amax().item()

    monkeypatch.setattr(MLP, "forward", trapped)
    with pytest.raises(RuntimeError):
        run_on_meta("llama")
