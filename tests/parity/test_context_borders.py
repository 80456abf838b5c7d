"""What crosses the borders between context ranks, and what does not: tokens, documents, labels and outputs.

Outputs of several ranks are those of one process within 1e-5 (relative, largest entry), as in `test_families.py`.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ds.hf.config import read_model
from megatron_ds.parallel.grid import Grid
from megatron_ds.runtime import load_model
from tests.parity.batches import ours
from tests.parity.cases import SEQ, VOCAB, Recipe
from tests.parity.context_cases import (
    DECODERS,
    EXPERTS,
    FAMILIES,
    FOUR,
    GATHER_2X2,
    GATHER_4,
    RING_2X2,
    RING_4,
    TWO,
    ULYSSES_4,
    with_axes,
)
from tests.parity.ours import Place, engine_config, session_of
from tests.parity.packed import Rows, draw_rows, packed
from tests.parity.reference import ALL_CONFIGS, make_model
from tests.ranks import run_grid

Batch = dict[str, Tensor]
ROWS = draw_rows(8, seed=0)
ODD_LENGTH = 27
SAMPLE = [
    ("llama", RING_2X2),
    ("gemma2-caps", GATHER_4),
    ("bloom-tied", RING_4),
    ("gpt2", ULYSSES_4),
    ("qwen3", with_axes(GATHER_2X2, 2, 1, 1, 1, True)),
    ("mistral", RING_4),
]
EVERYTHING = [
    (case, place)
    for case in (*DECODERS, "mistral", EXPERTS)
    for place in (*TWO, *FOUR, with_axes(RING_4, 2, 1, 1, 1, True), with_axes(RING_2X2, 1, 2, 1, 1))
    if (case, place) not in SAMPLE
]
BOTH = [*SAMPLE, *(pytest.param(case, place, marks=pytest.mark.sweep) for case, place in EVERYTHING)]


def _save(case: str, directory: Path) -> None:
    make_model(ALL_CONFIGS[case]).save_pretrained(directory)


def _engine(grid: Grid, directory: Path, place: Place) -> Any:
    config = engine_config(replace(place, zero=0), Recipe(), optimizer=None)
    return session_of(grid).build_engine(load_model(directory), config).engine


def _outputs(grid: Grid, directory: Path, place: Place, batches: list[Batch]) -> list[dict[str, Tensor]]:
    engine = _engine(grid, directory, place)
    return [found for found in map(engine.outputs, batches) if found is not None]


def outputs(directory: Path, place: Place, *batches: Batch) -> list[dict[str, Tensor]]:
    """Of each batch, on the last rank, and the same on all ranks that have them."""
    ranks = run_grid(_outputs, place.layout, directory, place, list(batches))
    for found in ranks[:-1]:
        for mine, last in zip(found, ranks[-1]):
            assert all(torch.equal(one, last[name]) for name, one in mine.items())
    return ranks[-1]


def borders(length: int = SEQ) -> list[int]:
    """The first positions of all parts that 2 or 4 ranks hold, the positions before and behind them, and the ends."""
    near = (border + offset for border in range(0, length + 1, 4) for offset in (-1, 0, 1))
    return sorted({position for position in near if 0 <= position < length})


@pytest.mark.parametrize(("case", "place"), BOTH, ids=str)
def test_a_token_changes_nothing_before_it(case: str, place: Place, once: Any) -> None:
    """In a row for each position, another token there: to the bit."""
    directory, _ = once(_save, case)
    at = torch.tensor(borders())
    ids = torch.randint(0, VOCAB, (1, SEQ), generator=torch.Generator().manual_seed(3)).repeat(len(at), 1)
    other = ids.scatter(1, at[:, None], (ids.gather(1, at[:, None]) + 1) % VOCAB)
    one, changed = (found["logits"] for found in outputs(directory, place, {"input_ids": ids}, {"input_ids": other}))
    differs = (one != changed).any(-1)
    positions = torch.arange(SEQ)
    assert not differs[positions < at[:, None]].any()
    assert differs[positions == at[:, None]].all()
    behind = (positions > at[:, None]) & (positions < at[:, None] + 6)  # within all windows
    assert differs[behind].all()


@pytest.mark.parametrize(("case", "place"), BOTH, ids=str)
def test_a_document_changes_no_other(case: str, place: Place, once: Any) -> None:
    """Other tokens in one document of each row, whichever borders it crosses: to the bit."""
    directory, _ = once(_save, case)
    numbers = [1 if len(row) > 1 else 0 for row in ROWS.rows]
    one, changed = (found["logits"] for found in outputs(directory, place, _inputs(ROWS), _inputs(_changed(numbers))))
    differs = (one != changed).any(-1)
    for row, (documents, number) in enumerate(zip(ROWS.rows, numbers)):
        lengths = [len(ids) for ids, _ in documents]
        start = sum(lengths[:number])
        own = torch.zeros(SEQ, dtype=torch.bool)
        own[start : start + lengths[number]] = True
        assert torch.equal(differs[row], own)


def _inputs(rows: Rows) -> Batch:
    return {name: column for name, column in packed(rows).items() if name != "targets"}


def _changed(numbers: list[int]) -> Rows:
    """The rows with other tokens in the document of each number."""
    found = []
    for row, number in zip(ROWS.rows, numbers):
        documents = list(row)
        ids, labels = documents[number]
        documents[number] = (ids + 1) % VOCAB, labels
        found.append(tuple(documents))
    return replace(ROWS, rows=tuple(found))


def test_the_documents_lie_across_the_borders() -> None:
    """Some begin in one part and end in another or a later one, some are one token, some a whole row but its end."""
    spans = []
    for documents in ROWS.rows:
        ends = torch.tensor([len(ids) for ids, _ in documents]).cumsum(0)
        spans += [(end - len(ids), end) for end, (ids, _) in zip(ends.tolist(), documents)]
    parts = [(last - 1) // 4 - first // 4 for first, last in spans]
    assert {last - first for first, last in spans} >= {1} and {0, 1, 2} <= set(parts)


@pytest.mark.parametrize(("case", "place"), BOTH, ids=str)
def test_padding_changes_nothing(case: str, place: Place, once: Any) -> None:
    """Other tokens under the mask, longer than a rank's part, on either side: to the bit."""
    directory, _ = once(_save, case)
    ids = torch.randint(0, VOCAB, (6, SEQ), generator=torch.Generator().manual_seed(4))
    seen = torch.arange(SEQ)[None] >= torch.tensor([0, 3, 9, 18, 0, 0])[:, None]
    seen &= torch.arange(SEQ)[None] < torch.tensor([SEQ, SEQ, SEQ, SEQ, 25, 12])[:, None]
    one, changed = (
        found["logits"]
        for found in outputs(
            directory,
            place,
            {"input_ids": ids, "attention_mask": seen},
            {"input_ids": torch.where(seen, ids, (ids + 1) % VOCAB), "attention_mask": seen},
        )
    )
    assert torch.equal(one[seen], changed[seen])


def _losses(grid: Grid, directory: Path, place: Place, batches: list[Batch]) -> list[list[float]]:
    engine = _engine(grid, directory, place)
    found = [engine.evaluate([batch]) for batch in batches]
    return [[losses.mean, *losses.terms.values()] for losses in found]


LABELLED = [
    *(("llama", RING_2X2), ("gpt2", GATHER_4), ("bert-pretraining", ULYSSES_4), ("t5-gated", RING_4)),
    *(
        pytest.param(case, place, marks=pytest.mark.sweep)
        for case in FAMILIES
        for place in (*TWO, *FOUR, with_axes(RING_2X2, 2, 1, 1, 1, True), with_axes(RING_4, 1, 2, 1, 1))
    ),
]


@pytest.mark.parametrize(("case", "place"), LABELLED, ids=str)
def test_a_single_label_counts_wherever_it_is(case: str, place: Place, once: Any) -> None:
    """The only label of a batch, at each position beside a border: the loss of one process."""
    directory, _ = once(_save, case)
    batches = [_with_one_label(case, position) for position in borders(24)]
    alone = run_grid(_losses, Place().layout, directory, Place(), batches)[0]
    for rank in run_grid(_losses, place.layout, directory, place, batches):
        torch.testing.assert_close(torch.tensor(rank), torch.tensor(alone), rtol=2e-6, atol=0.0)


def _with_one_label(case: str, position: int) -> Batch:
    from tests.parity.batches import batch_for

    model_type = ALL_CONFIGS[case]["model_type"]
    batch = ours(model_type, batch_for(model_type, Recipe(global_batch=4), 0))
    targets = torch.full_like(batch["targets"], -100)
    targets[1, position] = 17
    return {**batch, "targets": targets}


PREDICTED = [
    *(("llama", RING_2X2), ("bert-base", GATHER_4), ("t5-gated", with_axes(RING_2X2, 1, 2, 1, 1))),
    *(
        pytest.param(case, place, marks=pytest.mark.sweep)
        for case in (*FAMILIES, "bert-base", EXPERTS, "roberta-masked", "opt-before", "modernbert-masked")
        for place in (*TWO, *FOUR, with_axes(RING_2X2, 2, 1, 1, 1, True), with_axes(RING_4, 1, 2, 1, 1))
    ),
]


@pytest.mark.parametrize(("case", "place"), PREDICTED, ids=str)
def test_outputs_are_whole_and_in_order(case: str, place: Place, once: Any) -> None:
    """Of lengths that the ranks divide and that they do not, on all of them."""
    directory, _ = once(_save, case)
    batches = [_columns(directory, length) for length in (SEQ, ODD_LENGTH, 1)]
    expected = run_grid(_outputs, Place().layout, directory, Place(), batches)[0]
    for mine, theirs in zip(outputs(directory, place, *batches), expected, strict=True):
        assert mine.keys() == theirs.keys()
        for name, output in theirs.items():
            assert mine[name].shape == output.shape, (name, mine[name].shape, output.shape)
            torch.testing.assert_close(mine[name], output, rtol=1e-4, atol=1e-5)


def _columns(directory: Path, length: int) -> Batch:
    """Inputs of a model, of this length and of a shorter one where it has a decoder of its own."""
    core = read_model(directory).core
    generator = torch.Generator().manual_seed(length)
    columns = {"input_ids": torch.randint(4, VOCAB, (3, length), generator=generator)}
    if core.has_cross_attention:
        targets = max(1, length - 7)
        columns["decoder_input_ids"] = torch.randint(4, VOCAB, (3, targets), generator=generator)
    return columns
