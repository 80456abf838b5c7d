"""The request that a run makes to a data format: sources, lengths, order and options."""

from dataclasses import dataclass, field
from pathlib import Path

from megatron_ds.config.schema_base import Section
from megatron_ds.data.objective import DataObjective
from megatron_ds.data.readers.placeholders import Placeholders
from megatron_ds.data.readers.source import Source


@dataclass(frozen=True)
class Order:
    """The order in which a run reads its data, for datasets that arrange their samples themselves.

    Attributes:
        num_samples: samples of the whole run: steps times global batch size.
        seed: `train.seed`.
        shuffle: `data.shuffle`.
    """

    num_samples: int
    seed: int
    shuffle: bool


@dataclass(frozen=True)
class Split:
    """A part of each corpus.

    Attributes:
        fractions: of its documents, in order, as the user wrote them: training, validation, unused.
        part: index of the fraction that is read.
    """

    fractions: tuple[float, ...]
    part: int


@dataclass(frozen=True)
class DatasetRequest:
    """The arguments of a data format's `open`.

    Attributes:
        inputs: the sources, and how their rows are read; at least one.
        objective: training objective of the model; decides the columns of a sample.
        seq_length: S, positions of a sample.
        vocab_size: number of ids of the model; every id of the data must be below it.
        tokenizer_path: directory of a tokenizer; None = the run has none.
        cache_dir: directory for tokens and orders that are computed once.
        order: of the run; None = every sample once, in order, for validation.
        split: part of each corpus that is read; None = all of it.
        options: an instance of the format's `options` class; None where the format takes none.
        placeholders: ids that the data must not hold.
    """

    inputs: tuple[Source, ...]
    objective: DataObjective
    seq_length: int
    vocab_size: int
    tokenizer_path: str | None
    cache_dir: Path
    order: Order | None = None
    split: Split | None = None
    options: Section | None = None
    placeholders: Placeholders = field(default_factory=Placeholders)

    @property
    def sources(self) -> tuple[str, ...]:
        """Files, directories, patterns, saved `datasets`, hub ids or prefixes, as the user wrote them."""
        return tuple(source.path for source in self.inputs)
