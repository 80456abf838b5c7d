"""The memory of snapshots: one arena for all saves, and copies that are made as late as a GPU may make them."""

import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ds.checkpoint import saver as saver_module
from megatron_ds.checkpoint import snapshot_memory
from megatron_ds.checkpoint.directory import name_of
from megatron_ds.checkpoint.files import TensorHeader
from megatron_ds.checkpoint.snapshot_memory import Copies, HostMemory, StreamCopies
from megatron_ds.errors import CheckpointError
from megatron_ds.parallel.grid import Grid
from megatron_ds.parallel.rank_info import RankInfo
from tests.checkpoint.runs import CUT, Curve, save_run, saved_at
from tests.parity.cases import Recipe
from tests.parity.ours import Place
from tests.ranks import rank_device, run_alone, run_grid, run_ranks

RECIPE = Recipe()
BF16 = replace(RECIPE, precision="bf16")
PATIENCE_S = 20.0  # the writer of a snapshot waits so long for the optimizer's step, which must make the copies


class LateCopies(Copies):
    """Copies that are made when something waits for them, from whatever the tensors hold by then."""

    is_deferred = True

    def __init__(self) -> None:
        self.pending: list[tuple[Tensor, Tensor]] = []
        self.held_back = threading.Event()
        self.locked: list[int] = []

    def lock(self, memory: Tensor) -> Callable[[], Any]:
        self.locked.append(memory.nbytes)
        return lambda: self.locked.remove(memory.nbytes)

    def copy(self, place: Tensor, tensor: Tensor, *, is_temporary: bool) -> None:
        self.pending.append((place, tensor))

    def finish(self) -> None:
        assert self.pending, "a snapshot without tensors"

    def hold_back(self) -> None:
        for place, tensor in self.pending:
            place.copy_(tensor)
        if self.pending:
            self.pending.clear()
            self.held_back.set()

    def wait(self) -> None:
        assert self.held_back.wait(PATIENCE_S), "no step of the optimizer has waited for the copies"


def late_run(grid: Grid, directory: Path, place: Place, recipe: Recipe, folder: Path) -> Curve:
    saver_module.copies_for = lambda device: LateCopies()
    return save_run(grid, directory, place, recipe, folder)


@pytest.mark.parametrize(
    ("case", "place", "recipe"),
    [
        ("gpt2", Place(2, 1, 1, 1, True), RECIPE),  # gathered, transposed and fused tensors
        ("llama-1kv", Place(1, 1, 2, 3), BF16),  # gathered by ZeRO-3, and freed before the copy
        ("llama-1kv", Place(1, 1, 1, 0), RECIPE),  # the parameters themselves
        pytest.param("qwen2-tied", Place(2, 2, 1, 1, True), BF16, marks=pytest.mark.sweep),
        pytest.param("qwen2-tied", Place(1, 1, 2, 2), BF16, marks=pytest.mark.sweep),
    ],
    ids=str,
)
def test_copies_that_end_with_the_next_step_are_those_of_a_save_that_waits(
    case: str, place: Place, recipe: Recipe, references: Any, tmp_path: Path
) -> None:
    directory, _ = references(case, RECIPE)
    late = run_grid(late_run, place.layout, directory, place, recipe, tmp_path / "late")[0]
    assert late == saved_at(directory, place, recipe, tmp_path / "waiting", asynchronous=False)
    expected = {file.name: file for file in (tmp_path / "waiting" / name_of(CUT)).rglob("*.safetensors")}
    assert len(expected) > place.layout.world_size
    for file in (tmp_path / "late" / name_of(CUT)).rglob("*.safetensors"):
        assert file.read_bytes() == expected.pop(file.name).read_bytes(), file
    assert not expected


def header(*shape: int, dtype: torch.dtype = torch.float32) -> TensorHeader:
    return TensorHeader("one", dtype, shape)


def test_one_arena_serves_all_snapshots_and_grows() -> None:
    def inside() -> Any:
        copies = LateCopies()
        memory = HostMemory(copies)
        sizes, addresses = [], []
        for length in (1000, 10, 1000, 1001, 2000):
            tensors = [torch.arange(7.0).t(), torch.ones(3, 5).t(), torch.tensor(4.0), torch.arange(length).bfloat16()]
            memory.reserve([TensorHeader("", tensor.dtype, tuple(tensor.shape)) for tensor in tensors])
            places = [memory.copy(tensor, is_temporary=True) for tensor in tensors]
            memory.hold_back()
            assert all(torch.equal(place, tensor) for place, tensor in zip(places, tensors))
            assert all(place.is_contiguous() for place in places)
            sizes.append(memory.bytes)
            addresses.append(places[0].data_ptr())
            assert copies.locked == [memory.bytes]
        del memory
        return sizes, addresses, copies.locked

    sizes, addresses, locked = run_alone(inside)
    assert sizes[0] == 64 + 64 + 64 + 2048 == sizes[1] == sizes[2] == sizes[3] < sizes[4]
    assert len(set(addresses[:4])) == 1
    assert locked == [], "what was page-locked is freed with the memory"


def test_copies_on_a_cpu_are_made_at_once() -> None:
    memory = HostMemory(Copies())
    memory.reserve([header(4)])
    source = torch.ones(4)
    place = memory.copy(source, is_temporary=False)
    source += 1
    memory.finish()
    memory.hold_back()
    memory.wait()
    assert place.tolist() == [1.0] * 4 and not memory.is_deferred


# ---- the calls of a stream, without a GPU ----------------------------------------------------------------------------


class Gpu:
    """The parts of torch.cuda that the copies use; records what they ask for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, status: int = 0) -> None:
        self.calls: list[str] = []
        gpu = self

        class Stream:
            def __init__(self, name: Any = "side") -> None:
                self.name = "side" if isinstance(name, torch.device) else name

            def wait_stream(self, other: Any) -> None:
                gpu.calls.append(f"{self.name} waits for {other.name}")

            def wait_event(self, event: Any) -> None:
                gpu.calls.append(f"{self.name} waits for the end")

            def record_event(self) -> Any:
                return Event(str(len(gpu.calls)))

        class Event:
            def __init__(self, name: str = "the end") -> None:
                self.name = name

            def record(self, stream: Any) -> None:
                gpu.calls.append(f"{self.name} of {stream.name}")

            def synchronize(self) -> None:
                gpu.calls.append(f"host waits for {'the end' if self.name == 'the end' else 'a copy'}")

        class Cudart:
            def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
                gpu.calls.append(f"lock {size}")
                return status

            def cudaHostUnregister(self, address: int) -> int:
                gpu.calls.append("unlock")
                return 0

        monkeypatch.setattr("torch.cuda.Stream", Stream)
        monkeypatch.setattr("torch.cuda.Event", Event)
        monkeypatch.setattr("torch.cuda.current_stream", lambda device: Stream("training"))
        monkeypatch.setattr("torch.cuda.stream", lambda stream: nullcontext())
        monkeypatch.setattr("torch.cuda.device", lambda device: nullcontext())
        monkeypatch.setattr("torch.cuda.cudart", Cudart)


class OnGpu:
    """A tensor that says it is on a GPU."""

    is_cuda, nbytes = True, 600 * 2**20

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu

    def record_stream(self, stream: Any) -> None:
        self.gpu.calls.append(f"kept for {stream.name}")


class Slot:
    """A place in the arena."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu

    def copy_(self, tensor: Any, non_blocking: bool = False) -> None:
        self.gpu.calls.append("copy later" if non_blocking else "copy at once")


def test_a_stream_of_its_own_makes_the_copies_and_training_waits_before_its_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = Gpu(monkeypatch)
    copies, place, tensor = StreamCopies(torch.device("cuda", 0)), Slot(gpu), OnGpu(gpu)
    copy: Any = copies.copy
    copy(place, tensor, is_temporary=False)
    assert gpu.calls == ["side waits for training", "copy later"]
    gpu.calls.clear()
    copy(place, torch.ones(2), is_temporary=False)  # of an offloaded optimizer
    assert gpu.calls == ["copy at once"]
    gpu.calls.clear()
    copies.finish()
    copies.hold_back()
    copies.wait()
    assert gpu.calls == ["the end of side", "training waits for the end", "host waits for the end"]


def test_gathered_tensors_that_wait_for_their_copy_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)
    copies, place, tensor = StreamCopies(torch.device("cuda", 0)), Slot(gpu), OnGpu(gpu)
    copy: Any = copies.copy
    one = ["side waits for training", "copy later", "kept for side"]
    copy(place, tensor, is_temporary=True)
    assert gpu.calls == one
    copy(place, tensor, is_temporary=True)  # 1.2 GiB
    assert gpu.calls == [*one, *one, "host waits for a copy"]
    copies.finish()
    copy(place, tensor, is_temporary=True)
    assert gpu.calls.count("host waits for a copy") == 1


def test_page_locked_memory_is_unlocked_and_its_refusal_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)
    memory = HostMemory(snapshot_memory.copies_for(torch.device("cuda", 0)))
    memory.reserve([header(16)])
    memory.reserve([header(64)])
    del memory
    assert gpu.calls == ["lock 64", "unlock", "lock 256", "unlock"]
    Gpu(monkeypatch, status=2)
    refused = HostMemory(snapshot_memory.copies_for(torch.device("cuda", 0)))
    with pytest.raises(CheckpointError, match=r"^checkpoint.asynchronous=true needs .*; try checkpoint.asynchronous=f"):
        refused.reserve([header(64)])


# ---- on a GPU --------------------------------------------------------------------------------------------------------

MIB = 2**20
DELAY_CYCLES = 400_000_000  # of the stream of the copies: about 0.2 s


def races(info: RankInfo) -> dict[str, Any] | None:
    """What copies hold that begin late; None on a CPU."""
    device = rank_device()
    if device.type != "cuda":
        return None
    copies = StreamCopies(device)
    memory = HostMemory(copies)
    memory.reserve([header(64 * MIB)])
    found: dict[str, Any] = {}
    for name in ("held back", "not held back", "temporary"):
        source = torch.ones(64 * MIB, device=device)
        torch.cuda.synchronize()
        memory.reserve([header(64 * MIB)])
        with torch.cuda.stream(copies._stream):
            torch.cuda._sleep(DELAY_CYCLES)
        began_s = time.perf_counter()
        place = memory.copy(source, is_temporary=name == "temporary")
        memory.finish()
        found[f"{name} s"] = time.perf_counter() - began_s
        if name == "held back":
            memory.hold_back()
        if name == "temporary":
            del source
            source = torch.full((64 * MIB,), 2.0, device=device)  # in the same memory, if it is free
        else:
            source.fill_(2.0)
        memory.wait()
        found[name] = place.min().item(), place.max().item()
        assert place.is_pinned()
        torch.cuda.synchronize()
    return found


def test_copies_of_a_gpu_run_while_it_computes_and_hold_back_its_writes() -> None:
    (found,) = run_ranks(races, 1)
    if found is None:
        pytest.skip("ranks run on a CPU: DS_ACCELERATOR=cuda asks for a GPU")
    assert found["held back"] == found["temporary"] == (1.0, 1.0)
    assert found["not held back"][1] == 2.0, "and without holding back the test sees it"
    assert found["held back s"] < 0.1, "the host does not wait"
