"""With a table of kernels, a model computes the same, and each kernel is given only the norms and rotations that it
computes: no layer norm, no rotation whose products are fp32. The kernels here are their formulas, and count calls."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from megatron_ds.hf.config import read_model
from megatron_ds.layers.kernels import KERNELS, REFERENCE, Kernels
from megatron_ds.models.context import BuildContext
from megatron_ds.models.gpt import DecoderConfig
from megatron_ds.models.sequential import SequentialModel
from tests.parity.alone_batches import make_batch
from tests.parity.reference import ALL_CONFIGS
from tests.ranks import run_alone

NAMES = ("rms_norm", "add_rms_norm", "fp32_rms_norm", "swiglu", "geglu", "rotary")
BLOCKS = 4
# Calls of each kernel in one forward pass. A sequential block has one norm that is added, and one before it; of heads
# there are two more. The final norm is one of its own.
CALLS = {
    "hunyuan_v1_dense-alpha": {"rms_norm": 3 * BLOCKS + 1, "add_rms_norm": BLOCKS, "swiglu": BLOCKS, "rotary": BLOCKS},
    "apertus-bias": {"rms_norm": 3 * BLOCKS + 1, "add_rms_norm": BLOCKS, "rotary": BLOCKS},
    "ministral3-yarn": {"rms_norm": BLOCKS + 1, "add_rms_norm": BLOCKS, "swiglu": BLOCKS, "rotary": BLOCKS},
    "nemotron-bias": {"rotary": BLOCKS},
    "phi-normed-heads": {"rotary": BLOCKS},
    "cohere-normed-heads": {"swiglu": BLOCKS},
    "cohere2-every-second": {"swiglu": BLOCKS},
    "codegen-partial": {"rotary": BLOCKS},
}


def counting(name: str, calls: Counter[str]) -> Callable[..., Any]:
    def kernel(*arguments: Any) -> Any:
        calls[name] += 1
        return KERNELS[name].reference(*arguments)

    return kernel


def compared(case: str) -> tuple[dict[str, int], float, float]:
    """Calls, and the largest differences of the logits and of any gradient with and without kernels."""
    core = read_model(dict(ALL_CONFIGS[case])).core
    assert isinstance(core, DecoderConfig)
    batch, calls = make_batch(core, padded=True), Counter[str]()
    tables = [REFERENCE, Kernels(**{name: counting(name, calls) for name in NAMES})]  # type: ignore[arg-type]
    found = []
    for kernels in tables:
        model = SequentialModel(core.build_layers(BuildContext(kernels=kernels))).eval()
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
            logits = model(batch.columns)["logits"]
        made = dict(calls)
        model(batch.columns, batch.labels).sum().backward()
        found.append((logits, [parameter.grad for parameter in model.parameters()]))
    (plain, gradients), (other, others) = found
    apart = max(float((one - two).abs().max() / (1 + one.abs().max())) for one, two in zip(gradients, others))
    return made, float((plain - other).abs().max()), apart


def test_kernels_compute_what_they_can_and_no_more() -> None:
    found = run_alone(lambda: {case: compared(case) for case in CALLS})
    for case, (calls, logits, gradients) in found.items():
        assert calls == CALLS[case], case
        assert logits < 1e-4 and gradients < 1e-4, case
