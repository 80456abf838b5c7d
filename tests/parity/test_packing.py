"""Several documents in one sequence are, in loss and gradients, what they are one by one: ours and transformers'.

fp32 bounds (relative): loss 1e-6, gradients 1e-5 L2 (of a key bias without rotation, whose gradient is 0 in exact
arithmetic, of a hundredth of the model's root mean square); five steps as in `test_layouts`.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ds.engine.pipeline.boundary import Boundary
from megatron_ds.hf.config import read_model
from megatron_ds.hf.reference import load_reference, predict
from megatron_ds.hf.to_hf import ToHF
from megatron_ds.hf.weights import HFWeights
from megatron_ds.layers import attention
from megatron_ds.layers.documents import DocumentLimit, cumulative_lengths, with_document_bounds
from megatron_ds.layers.embedding import LearnedPositions
from megatron_ds.layers.kernels import KERNELS, AttentionCall, Candidate
from megatron_ds.layers.kernels.reference import reference_attention
from megatron_ds.parallel.grid import Grid
from megatron_ds.runtime import load_model
from megatron_ds.verify.compare import difference, root_mean_square, smallest_norm
from tests.halves import swept
from tests.parity.batches import ours, reference_loss
from tests.parity.cases import Recipe
from tests.parity.errors import relative_errors, within_fp32
from tests.parity.ours import Place, engine_config, micro_batches, session_of, train_ours
from tests.parity.packed import Rows, draw_rows, packed, unpacked
from tests.parity.reference import ALL_CONFIGS, make_model
from tests.ranks import run_alone, run_grid

# Each way that a position matters: rotation (scaled, partial, by length, in some layers), tables, biases, windows,
# capped scores, queries that grow.
CASES = (
    "exaone4-every-fourth-full-two-kv-heads",
    *("llama", "gpt2", "mistral", "qwen3", "opt-before", "bloom-tied", "falcon-40b-alibi-one-group", "gemma2-caps"),
    *("gptj-partial", "phi3-longrope-beyond", "llama-dynamic-beyond", "ministral3-yarn"),
)
SWEPT = (
    *("olmo3-yarn-two-kv-heads-bias", "granitemoehybrid-no-positions-tied", "glm4-half-two-kv-heads"),
    *("biogpt-scaled", "cohere2-every-second", "gpt_neo-untied", "hunyuan_v1_dense-alpha"),
)
PLACES = [Place(2, 1), Place(2, 1, sp=True), Place(1, 2), Place(2, 2, sp=True)]
ROWS = draw_rows(8, seed=0)
Run = tuple[float, dict[str, Tensor]]
"""A loss, and gradients by Hugging Face name."""


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """case -> a directory with a model, and transformers' loss and gradients of the documents one by one."""
    made: dict[str, Path] = {}

    def get(case: str) -> Path:
        if case not in made:
            made[case] = tmp_path_factory.mktemp(case)
            run_alone(_reference, case, made[case])
        return made[case]

    return get


def _reference(case: str, directory: Path) -> None:
    make_model(ALL_CONFIGS[case]).save_pretrained(directory)
    model = HFWeights(directory, read_model(directory)).model
    theirs = load_reference(directory, model, torch.float32)
    loss = reference_loss(theirs, unpacked(ROWS))
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    torch.save((float(loss.detach()), gradients), directory / "reference.pt")


def _gradients(grid: Grid, directory: Path, place: Place, batch: dict[str, Tensor]) -> Run:
    """Ours, of one micro-batch; the gradients on rank 0."""
    model = load_model(directory)
    size = len(batch["input_ids"])
    recipe = Recipe(global_batch=size, grad_clip=0.0)
    config = engine_config(replace(place, zero=0), recipe, optimizer=None, micro_batch_size=size)
    engine = session_of(grid).build_engine(model, config).engine
    loss = engine.train_step([batch], lr=0.0).loss
    found, to_hf = {}, ToHF(model.hf)
    for name, gradient in engine.full_tensors(engine.optimizer.gradient):  # type: ignore[attr-defined]
        if gradient is not None:
            found.update({theirs: tensor.clone() for theirs, tensor in to_hf.add(name, gradient)})
    return loss, found


def _run(directory: Path, place: Place, batch: dict[str, Tensor]) -> Run:
    return run_grid(_gradients, place.layout, directory, place, batch)[0]


def _errors(mine: Run, reference: Run) -> tuple[float, float]:
    """Relative, of the loss and of the worst gradient."""
    (loss, gradients), (their_loss, theirs) = mine, reference
    typical = root_mean_square(theirs.values())
    worst = max(
        difference(gradient, theirs[name], smallest_norm(gradient.numel(), typical)).relative
        for name, gradient in gradients.items()
    )
    return abs(loss / their_loss - 1), worst


def _alone(directory: Path) -> Run:
    return torch.load(directory / "reference.pt", weights_only=True)


EACH_ALONE = [
    *((case, place) for case in CASES for place in (Place(1, 1), Place(2, 1, sp=True, recompute="full"))),
    *swept(*((case, Place(2, 2, sp=True, recompute="full")) for case in (*CASES, *SWEPT))),
    *swept(*((case, Place(1, 1)) for case in SWEPT)),
]


@pytest.mark.parametrize(("case", "place"), EACH_ALONE, ids=str)
def test_packed_equals_transformers_one_by_one(case: str, place: Place, models: Any) -> None:
    loss, gradients = _errors(_run(models(case), place, packed(ROWS)), _alone(models(case)))
    assert loss < 1e-6 and gradients < 1e-5, (loss, gradients)


AT_LAYOUTS = [("llama", PLACES[0]), ("gpt2", PLACES[1]), ("mistral", PLACES[2]), ("llama", PLACES[3])]
REST = [(case, place) for case in ("llama", "gpt2", "mistral") for place in PLACES if (case, place) not in AT_LAYOUTS]


@pytest.mark.parametrize(("case", "place"), [*AT_LAYOUTS, *swept(*REST)], ids=str)
def test_packed_equals_unpacked_at_every_layout(case: str, place: Place, models: Any) -> None:
    mine = _run(models(case), place, packed(ROWS))
    loss, gradients = _errors(mine, _run(models(case), place, ours("llama", unpacked(ROWS))))
    assert loss < 1e-6 and gradients < 1e-5, (loss, gradients)
    loss, gradients = _errors(mine, _alone(models(case)))
    assert loss < 1e-6 and gradients < 1e-5, (loss, gradients)


def _seeing_each_other() -> None:
    """Documents of a sequence attend to the ones before."""
    allowed = attention.allowed_keys
    attention.allowed_keys = lambda *given: allowed(*given[:4])


def _positions_going_on() -> None:
    """Learned positions by the place in the sequence. (Of rotations, only their differences matter.)"""
    add = LearnedPositions.forward
    LearnedPositions.forward = lambda self, x, *others: add(self, x)  # type: ignore[method-assign]


def _positions_lost_on_the_way() -> None:
    """A later pipeline stage takes the sequence for one document."""
    unpack = Boundary.unpack

    def going_on(self: Boundary, *args: Any) -> Any:
        wire = unpack(self, *args)
        positions = wire["position_ids"]
        return {**wire, "position_ids": torch.arange(positions.shape[1]).repeat(len(positions), 1)}

    Boundary.unpack = going_on  # type: ignore[method-assign]


def _in_the_trap(grid: Grid, trap: Callable[[], None], directory: Path, place: Place) -> Run:
    trap()
    return _gradients(grid, directory, place, packed(ROWS))


@pytest.mark.parametrize(
    ("trap", "case", "place"),
    [
        (_seeing_each_other, "llama", Place(1, 1)),
        (_positions_going_on, "gpt2", Place(2, 1, sp=True)),
        (_positions_lost_on_the_way, "llama", Place(1, 2)),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_trap_turns_it_red(trap: Callable[[], None], case: str, place: Place, models: Any) -> None:
    caught = run_grid(_in_the_trap, place.layout, trap, models(case), place)[0]
    loss, gradients = _errors(caught, _alone(models(case)))
    assert loss > 1e-5 and gradients > 1e-3, (loss, gradients)


PACKED = Recipe(packed=True)
TRAINED = [
    ("llama", Place(1, 1, 2, 0)),
    ("llama", Place(1, 1, 2, 2)),
    ("gpt2", Place(2, 2, 1, 1, True, recompute="selective")),
    ("qwen3", Place(1, 1, 2, 3, recompute="full")),
    *swept(*(("llama", place) for place in (Place(2, 1, 2, 2, True), Place(2, 1, 2, 3), Place(2, 2, 2, 1)))),
    *swept(("qwen3", Place(1, 1, 4, 3, recompute="full"))),
]


@pytest.mark.parametrize(("case", "place"), TRAINED, ids=str)
def test_five_steps_equal_transformers(case: str, place: Place, references: Any) -> None:
    """Packed here, one by one there; under every stage of ZeRO."""
    directory, reference = references(case, PACKED)
    errors = relative_errors(train_ours(directory, place, PACKED), reference)
    assert within_fp32(errors), errors


def _changed(rows: Rows, row: int, number: int) -> Rows:
    """With other tokens in one document."""
    documents = list(rows.rows[row])
    ids, labels = documents[number]
    documents[number] = (ids + 1) % 100, labels
    return Rows((*rows.rows[:row], tuple(documents), *rows.rows[row + 1 :]))


def _logits(grid: Grid, directory: Path, sequence: bool, batches: list[dict[str, Tensor]]) -> list[Tensor]:
    place = Place(grid.tensor.size, sp=sequence, zero=0)
    engine = session_of(grid).build_engine(load_model(directory), engine_config(place, Recipe())).engine
    found = [engine.outputs({name: one for name, one in batch.items() if name != "targets"}) for batch in batches]
    return [outputs["logits"] for outputs in found if outputs is not None]


@pytest.mark.parametrize("case", ["llama", "gpt2", "mistral", "bloom-tied", "gemma2-caps"])
def test_nothing_leaks_from_one_document_to_another(case: str, models: Any) -> None:
    """Other tokens in one document change its logits and, to the bit, no other's."""
    row, number = 4, 1
    before, after = packed(ROWS), packed(_changed(ROWS, row, number))
    place = Place(2, 1, sp=True)
    logits = run_grid(_logits, place.layout, models(case), place.sp, [before, after])[0]
    differs = (logits[0] != logits[1]).any(-1)
    lengths = [len(ids) for ids, _ in ROWS.rows[row]]
    start = sum(lengths[:number])
    assert len(lengths) > number + 1 and differs[row, start : start + lengths[number]].all()
    differs[row, start : start + lengths[number]] = False
    assert not differs.any()


def test_the_reference_takes_documents_one_by_one(models: Any) -> None:
    """What `export.check` compares packed data with."""

    def both(directory: Path) -> tuple[Tensor, Tensor]:
        model = HFWeights(directory, read_model(directory)).model
        theirs = load_reference(directory, model, torch.float32)
        columns = {name: one for name, one in packed(ROWS).items() if name != "targets"}
        with torch.no_grad():
            alone = predict(theirs, model, {"input_ids": unpacked(ROWS)["input_ids"]})["logits"]
            return predict(theirs, model, columns)["logits"], alone

    run_on_all_ranks, alone = run_alone(both, models("llama"))
    at = [
        (row, sum(len(ids) for ids, _ in documents[:number]), len(documents[number][0]))
        for row, documents in enumerate(ROWS.rows)
        for number in range(len(documents))
    ]
    for one, (row, start, length) in zip(alone, at, strict=True):
        assert torch.equal(run_on_all_ranks[row, start : start + length], one[:length])


def _seen_by_kernels(grid: Grid, directory: Path, place: Place) -> list[tuple[bool, int | None, tuple[int, ...]]]:
    """What a kernel is told of documents, call by call: right bounds, the longest, the shape of the bounds."""
    found = []

    def record(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        if call.positions is None or call.bounds is None:  # in the check at the start
            return reference_attention(q, k, v, call)
        begins = cumulative_lengths(q.shape[1], q.shape[0], call.bounds, q.device).unique()
        expected = (call.positions.flatten() == 0).nonzero().flatten()
        found.append((torch.equal(begins[:-1].long(), expected), call.longest, tuple(call.bounds.shape)))
        return reference_attention(q, k, v, call).to(q.dtype)

    KERNELS["attention"].register("record", Candidate("torch", lambda: record, devices=("cpu",)))
    recipe = replace(PACKED, precision="bf16")
    kernels = {"rms_norm": "torch", "swiglu": "torch", "cross_entropy": "torch", "attention": "record"}
    engine = session_of(grid).build_engine(load_model(directory), engine_config(place, recipe, kernels=kernels)).engine
    found.clear()
    engine.train_step(micro_batches(grid, place, recipe, 0), recipe.lr)
    engine.evaluate(micro_batches(grid, place, recipe, 1))
    return found


@pytest.mark.parametrize("place", [Place(1, 2, recompute="full"), Place(2, 1, sp=True, recompute="selective")], ids=str)
def test_kernels_are_given_the_bounds_of_documents(place: Place, models: Any) -> None:
    """At each layer of each stage, again where it recomputes; in a step all have one shape and the same longest."""
    rows = [packed(draw_rows(8, seed))["position_ids"] for seed in (0, 1)]
    expected = []
    for positions in rows:
        limit = DocumentLimit()
        parts = [{"position_ids": part} for part in positions.split(4)]
        bounds = with_document_bounds(parts, limit)[0]["document_bounds"]
        expected.append((True, limit.longest, tuple(bounds.shape)))
    layers = 4 // place.pp
    for calls in run_grid(_seen_by_kernels, place.layout, models("llama"), place):
        trained, evaluated = 2 * 2 * layers, 2 * layers
        assert calls == [expected[0]] * trained + [expected[1]] * evaluated
