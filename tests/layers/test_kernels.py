"""The table of kernels: what is picked, how it is checked, and that layers compute the same with it.

flash-attn and liger-kernel need a GPU; here a stand-in of flash-attn's documented interface, written in PyTorch, takes
its place.
"""

import sys
from dataclasses import replace
from importlib.metadata import version
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ds.errors import ConfigError
from megatron_ds.hf.config import read_model
from megatron_ds.layers.kernels import KERNELS, AttentionCall, Candidate, Kernels, Operation, select, select_kernels
from megatron_ds.layers.kernels.check import validated
from megatron_ds.layers.kernels.flash import flash_attention
from megatron_ds.layers.kernels.reference import AttentionKernel, reference_attention
from megatron_ds.layers.param_spec import initial_shard, spec_of
from megatron_ds.models.context import BuildContext
from megatron_ds.models.sequential import SequentialModel
from tests.parallel.axes import ALONE
from tests.parity.reference import ALL_CONFIGS
from tests.ranks import run_alone

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
SWIGLU, ATTENTION = KERNELS["swiglu"], KERNELS["attention"]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
) -> Tensor:
    """(B, S, N, D): softcap 0 is none, a window of (left, right) keys beside the query's own, -1 is all."""
    assert causal and window_size[1] in (-1, 0)
    length, group = q.shape[1], q.shape[2] // k.shape[2]
    k, v = (part.float().repeat_interleave(group, dim=2) for part in (k, v))
    scores = torch.einsum("bind,bjnd->bnij", q.float(), k) * softmax_scale
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    back = torch.arange(length)[:, None] - torch.arange(length)[None]
    hidden = (back < 0) | (back > (window_size[0] if window_size[0] >= 0 else length))
    return torch.einsum("bnij,bjnd->bind", scores.masked_fill(hidden, -torch.inf).softmax(-1), v).to(q.dtype)


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, bounds_q: Tensor, bounds_k: Tensor, longest_q: int, longest_k: int, **options: Any
) -> Tensor:
    """(tokens, N, D), documents one after the other; int32 bounds, one more than there are documents."""
    assert bounds_q.dtype == torch.int32 and torch.equal(bounds_q, bounds_k) and int(bounds_q[-1]) == len(q)
    lengths = bounds_q.diff().tolist()
    assert min(lengths) >= 0 and max(lengths) <= min(longest_q, longest_k)
    parts = zip(*(part.split(lengths) for part in (q, k, v)))
    return torch.cat([flash_attn_func(*(one[None] for one in part), **options)[0] for part in parts])


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> AttentionKernel:
    module = ModuleType("flash_attn")
    vars(module).update(flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return flash_attention()


POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 0]])


@pytest.mark.parametrize("window", [None, 1, 3, 8])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("positions", [None, POSITIONS], ids=["one", "packed"])
def test_flash_attention_is_asked_for_the_same(
    flash: Any, window: int | None, softcap: float | None, positions: Tensor | None
) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(8, 2, 4, 16), torch.randn(8, 2, 2, 16), torch.randn(8, 2, 2, 16)
    call = AttentionCall(0.3, window, softcap, positions)
    found, expected = flash(q, k, v, call), reference_attention(q, k, v, call)
    assert found.shape == q.shape
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def table(**candidates: dict[str, Candidate]) -> dict[str, Operation]:
    """Operations with other candidates than those that are installed here."""
    found = {}
    for name, operation in KERNELS.items():
        found[name] = Operation(name, operation.reference, operation.examples, operation.differentiable)
        for key, one in candidates.get(name, {}).items():
            found[name].register(key, one)
    return found


def candidate(make: Any, package: str = "torch", **options: Any) -> Candidate:
    return Candidate(package, make, **{"distribution": package, **options})


def test_nothing_is_picked_on_a_cpu() -> None:
    assert select_kernels("auto", CPU) == select_kernels("torch", CUDA) == Kernels()
    assert {name: operation.names for name, operation in KERNELS.items()} == {
        "rms_norm": ("triton", "liger"),
        "swiglu": ("triton", "liger"),
        "attention": ("flash3", "flash4", "flash", "varlen", "flex"),
        "cross_entropy": ("triton",),
        "add_rms_norm": ("triton",),
        "fp32_rms_norm": ("triton",),
        "geglu": ("triton",),
        "rotary": ("triton",),
    }


def test_what_is_not_installed_is_not_picked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "validated", lambda operation, candidate, device, field: operation.reference)
    missing = {"liger": candidate(lambda: None, "liger_kernel_of_nobody")}
    both = {**missing, "here": candidate(lambda: None), "later": candidate(lambda: None, "numpy")}
    found = select_kernels("auto", CUDA, table(rms_norm=missing, swiglu=both))
    assert found == Kernels(swiglu=SWIGLU.reference, names=(f"swiglu: torch {version('torch')}",))


def test_each_operation_has_its_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "validated", lambda operation, candidate, device, field: (candidate.package, field))
    first = candidate(lambda: None)
    second = candidate(lambda: None, "numpy", distribution=None, devices=("cuda", "cpu"))
    three = table(**{name: {"first": first, "second": second} for name in ("rms_norm", "swiglu", "attention")})
    found = select_kernels({"attention": "second", "swiglu": "torch"}, CUDA, three)
    assert (found.rms_norm, found.swiglu) == (("torch", "train.kernels=auto"), None)
    assert found.attention == ("numpy", "train.kernels.attention=second")
    assert found.names == (f"rms_norm: torch {version('torch')}", "attention: numpy")
    assert select_kernels({"attention": "auto"}, CPU, three).attention == ("numpy", "train.kernels=auto")


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("fast", "train.kernels=fast is not one of auto, torch"),
        (
            {"attn": "torch"},
            "train.kernels.attn=torch: attn is not one of rms_norm, swiglu, attention, cross_entropy, add_rms_norm, "
            "fp32_rms_norm, geglu, rotary; did you mean attention?",
        ),
        (
            {"attention": "flsh"},
            "train.kernels.attention=flsh is not one of auto, torch, flash, absent; did you mean flash?",
        ),
        ({"swiglu": 3}, "train.kernels.swiglu=3 is not one of auto, torch"),
        ({"attention": "flash"}, "train.kernels.attention=flash runs on cuda, not on cpu; try auto"),
        (
            {"attention": "absent"},
            "train.kernels.attention=absent needs the package not_there, which is not installed; install it, or try "
            "auto",
        ),
    ],
)
def test_a_choice_that_cannot_be_is_refused(wanted: Any, message: str) -> None:
    absent = candidate(lambda: None, "not_there", devices=("cpu",))
    with pytest.raises(ConfigError) as caught:
        select_kernels(wanted, CPU, table(attention={"flash": candidate(lambda: None), "absent": absent}))
    assert str(caught.value) == message


def test_a_kernel_from_outside_computes() -> None:
    """On a CPU too, where it says so; it is checked like all others."""

    def doubled(wide: Tensor) -> Tensor:
        return 2 * SWIGLU.reference(wide)

    here = candidate(lambda: SWIGLU.reference, devices=("cpu",))
    found = select_kernels({"swiglu": "mine"}, CPU, table(swiglu={"mine": here}))
    assert found.swiglu is SWIGLU.reference
    with pytest.raises(ConfigError, match=r"^train.kernels.swiglu=mine: torch .*, swiglu: differs from PyTorch by"):
        select_kernels({"swiglu": "mine"}, CPU, table(swiglu={"mine": replace(here, make=lambda: doubled)}))


def test_a_kernel_is_checked_with_its_gradients(flash: Any) -> None:
    for one in KERNELS.values():
        assert validated(one, candidate(lambda one=one: one.reference), CPU) is one.reference
    assert validated(ATTENTION, candidate(lambda: flash), CPU) is flash

    def other_gradient(wide: Tensor) -> Tensor:
        gate, up = wide.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate.detach()) * up

    for wrong in (lambda wide: 1.1 * SWIGLU.reference(wide), other_gradient, lambda wide: wide[..., :32] * torch.nan):
        with pytest.raises(ConfigError, match=r"train.kernels=auto: torch .*, swiglu: differs from PyTorch by .* try "):
            validated(SWIGLU, candidate(lambda wrong=wrong: wrong), CPU)
    with pytest.raises(
        ConfigError, match=r"swiglu: ZeroDivisionError.*try train.kernels=torch, or train.kernels.swiglu=torch "
    ):
        validated(SWIGLU, candidate(lambda: 1 / 0), CPU)


class Counted:
    """Reference kernels that count their calls."""

    def __init__(self) -> None:
        self.calls = dict.fromkeys(KERNELS, 0)

    def kernels(self) -> Kernels:
        def counting(one: Operation) -> Any:
            def call(*arguments: Any) -> Any:
                self.calls[one.name] += 1
                result = one.reference(*arguments)
                return result.to(arguments[0].dtype) if isinstance(result, Tensor) else result

            return call

        return Kernels(**{one.name: counting(one) for one in KERNELS.values()})


def losses(case: str, at: BuildContext, dtype: torch.dtype, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Loss, and its gradient to the word embedding."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = SequentialModel(read_model(ALL_CONFIGS[case]).core.build_layers(at))
    finally:
        torch.set_default_dtype(default)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_shard(name, spec_of(parameter), 5, ALONE))
    loss = model(batch, {"targets": batch["input_ids"]}).sum()
    loss.backward()
    embedding = dict(model.named_parameters())["embedding.weight"].grad
    assert embedding is not None
    return loss.detach().float(), embedding.float()


LLAMAS = {"rms_norm", "add_rms_norm", "swiglu", "rotary", "attention"}
# which operations are used, attention in half precision only
USED = {
    "llama": LLAMAS,
    "qwen3": LLAMAS,
    "mistral-window": LLAMAS,
    "gemma2-caps": {"fp32_rms_norm", "geglu", "rotary", "attention"},
    "falcon-7b-alibi": set(),
    "gpt2": {"attention"},
    "olmo2-all-heads": {"fp32_rms_norm", "swiglu", "rotary", "attention"},
}


@pytest.mark.parametrize("case", USED)
@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
def test_layers_compute_the_same_with_kernels(case: str, packed: bool) -> None:
    batch = {"input_ids": torch.randint(3, 60, (2, 8), generator=torch.Generator().manual_seed(1))}
    if packed:
        batch["position_ids"] = POSITIONS
    run_alone(_compare, case, batch)


def _compare(case: str, batch: dict[str, Tensor]) -> None:
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        counted = Counted()
        plain, plain_grad = losses(case, BuildContext(), dtype, batch)
        with_kernels, grad = losses(case, BuildContext(kernels=counted.kernels()), dtype, batch)
        assert abs(float(with_kernels - plain)) <= tolerance * float(plain)
        assert float((grad - plain_grad).norm()) <= 2 * tolerance * float(plain_grad.norm())
        used = {name for name, calls in counted.calls.items() if calls > 0}
        assert used == {*USED[case], "cross_entropy"} - ({"attention"} if dtype == torch.float32 else set()), (
            counted.calls
        )


def test_tuples_and_results_without_gradients_are_compared() -> None:
    def parts(x: Tensor, y: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        return x * y, (x + y) * scale

    def in_place(x: Tensor, y: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        product = x.clone() * y
        return product, x.add_(y).mul_(scale)

    def with_detached(x: Tensor, y: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        return x * y.detach(), (x + y) * scale

    def example(random: Any) -> tuple[Any, ...]:
        return random(3, 4), random(3, 4), 2.0

    pair = Operation("pair", parts, (example,))
    assert validated(pair, candidate(lambda: in_place), CPU) is in_place
    with pytest.raises(ConfigError, match="pair: differs from PyTorch by"):
        validated(pair, candidate(lambda: with_detached), CPU)
    own = Operation("own", parts, (example,), differentiable=False)
    assert validated(own, candidate(lambda: with_detached), CPU) is with_detached
    with pytest.raises(ConfigError, match="own: differs from PyTorch by"):
        validated(own, candidate(lambda: lambda *arguments: parts(*arguments)[::-1]), CPU)
