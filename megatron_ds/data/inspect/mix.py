"""The bands of a mix of lengths, and what a run reads of each."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_ds.data.blend import source_usage
from megatron_ds.data.dataset import Dataset
from megatron_ds.data.held_out import SampleSubset
from megatron_ds.data.inspect.histogram import LengthHistogram, length_histogram
from megatron_ds.data.long_context.dataset import BandDataset
from megatron_ds.data.parts import parts_of


@dataclass(frozen=True)
class BandUse:
    """A band of a run's data. The attributes are keys of `inspect --json`.

    Attributes:
        name: the documents, with the source in blends of several.
        share: of the run's samples.
        documents, tokens: of the band.
        samples: number of different samples.
        whole: number of samples that hold one document alone; with a share held out, of training and validation.
        taken: samples that the complete run reads, repeated ones included.
        epochs: the same as a multiple of `samples`.
    """

    name: str
    share: float
    documents: int
    tokens: int
    samples: int
    whole: int
    taken: int
    epochs: float


def mix_of(data: Dataset) -> tuple[BandUse, ...]:
    """Return the bands of a run's training data; empty for data without a mix of lengths."""
    bands = list(_bands(data))
    return tuple(
        BandUse(
            name=use.name,
            share=use.weight,
            documents=band.num_documents,
            tokens=band.num_tokens,
            samples=samples,
            whole=band.num_whole,
            taken=use.samples,
            epochs=use.epochs,
        )
        for (band, samples), use in zip(bands, source_usage(data, len(data)) if bands else (), strict=True)
    )


def mix_lengths(data: Dataset) -> LengthHistogram | None:
    """Return the lengths of the documents in all bands; None for data without a mix of lengths."""
    lengths = [band.lengths for band, _ in _bands(data)]
    return length_histogram("documents", np.concatenate(lengths)) if lengths else None


def _bands(data: Dataset) -> Iterator[tuple[BandDataset, int]]:
    """Yield each band with the number of its samples that are read."""
    for _, part in parts_of(data):
        whole = part.whole if isinstance(part, SampleSubset) else part
        if isinstance(whole, BandDataset):
            yield whole, len(part)
