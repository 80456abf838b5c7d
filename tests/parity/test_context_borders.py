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
from tests.parity.batches import batch_for, ours
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
    ULYSSES_2,
    ULYSSES_4,
    with_axes,
)
from tests.parity.ours import Place, engine_config, session_of
from tests.parity.packed import Rows, draw_rows, packed
from tests.parity.reference import ALL_CONFIGS, make_model
from tests.ranks import run_grid

Batch = dict[str, Tensor]
ROWS = draw_rows(8, seed=0)
CHANGED = [min(1, len(row) - 1) for row in ROWS.rows]  # of each row the number of a document
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
def test_nothing_leaks(case: str, place: Place, once: Any) -> None:
    """Other tokens change no logits before them, of no other document, and none if they are masked: to the bit."""
    directory, _ = once(_save, case)
    pairs = [_other_tokens(), _other_documents(), _other_padding()]
    found = [each["logits"] for each in outputs(directory, place, *(batch for pair in pairs for batch in pair))]
    tokens, documents, padding = ((a != b).any(-1) for a, b in zip(found[::2], found[1::2]))
    at, positions = torch.tensor(borders())[:, None], torch.arange(SEQ)
    assert not tokens[positions < at].any()
    assert tokens[(positions >= at) & (positions < at + 6)].all()  # within all windows
    assert torch.equal(documents, _of_changed_documents())
    assert not padding[pairs[2][0]["attention_mask"]].any()


def _other_tokens() -> tuple[Batch, Batch]:
    """A row for each position in `borders`, and another token there."""
    at = torch.tensor(borders())[:, None]
    ids = torch.randint(0, VOCAB, (1, SEQ), generator=torch.Generator().manual_seed(3)).repeat(len(at), 1)
    return {"input_ids": ids}, {"input_ids": ids.scatter(1, at, (ids.gather(1, at) + 1) % VOCAB)}


def _other_documents() -> tuple[Batch, Batch]:
    """Rows of documents, and other tokens in one of each row, whichever borders it crosses."""
    changed = []
    for documents, number in zip(ROWS.rows, CHANGED):
        ids, labels = documents[number]
        changed.append((*documents[:number], ((ids + 1) % VOCAB, labels), *documents[number + 1 :]))
    return _inputs(ROWS), _inputs(replace(ROWS, rows=tuple(changed)))


def _inputs(rows: Rows) -> Batch:
    return {name: column for name, column in packed(rows).items() if name != "targets"}


def _of_changed_documents() -> Tensor:
    """Where the tokens of the changed documents are, (rows, S) bool."""
    own = torch.zeros(len(ROWS.rows), SEQ, dtype=torch.bool)
    for row, (documents, number) in enumerate(zip(ROWS.rows, CHANGED)):
        start = sum(len(ids) for ids, _ in documents[:number])
        own[row, start : start + len(documents[number][0])] = True
    return own


def _other_padding() -> tuple[Batch, Batch]:
    """Rows with padding on either side, longer than a rank's part, and other tokens under the mask."""
    ids = torch.randint(0, VOCAB, (6, SEQ), generator=torch.Generator().manual_seed(4))
    seen = torch.arange(SEQ)[None] >= torch.tensor([0, 3, 9, 18, 0, 0])[:, None]
    seen &= torch.arange(SEQ)[None] < torch.tensor([SEQ, SEQ, SEQ, SEQ, 25, 12])[:, None]
    other = torch.where(seen, ids, (ids + 1) % VOCAB)
    return {"input_ids": ids, "attention_mask": seen}, {"input_ids": other, "attention_mask": seen}


def test_the_documents_lie_across_the_borders() -> None:
    """Some begin in one part and end in another or a later one, some are one token, some a whole row but its end."""
    spans = []
    for documents in ROWS.rows:
        ends = torch.tensor([len(ids) for ids, _ in documents]).cumsum(0)
        spans += [(end - len(ids), end) for end, (ids, _) in zip(ends.tolist(), documents)]
    parts = [(last - 1) // 4 - first // 4 for first, last in spans]
    assert {last - first for first, last in spans} >= {1} and {0, 1, 2} <= set(parts)


def _losses(grid: Grid, directory: Path, place: Place, batches: list[Batch]) -> list[list[float]]:
    engine = _engine(grid, directory, place)
    found = [engine.evaluate([batch]) for batch in batches]
    return [[losses.mean, *losses.terms.values()] for losses in found]


LABELLED = [
    *(("llama", RING_2X2), ("gpt2", GATHER_4), ("t5-gated", ULYSSES_2)),
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
