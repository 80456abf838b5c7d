"""Data formats by name: what each one reads and which settings it heeds. Code of other packages may register more.

```python
FORMATS.register("csv", DataFormat(open_csv, options=CsvOptions))
```
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pydantic import ValidationError

from megatron_ds.cache import cache_folder
from megatron_ds.config import DataSection, DataSource
from megatron_ds.config.error_messages import explain
from megatron_ds.config.schema_base import Section
from megatron_ds.data.blend import open_blend
from megatron_ds.data.chat.open import open_chat
from megatron_ds.data.chat.options import FIELDS as CHAT_FIELDS
from megatron_ds.data.chat.options import ChatOptions
from megatron_ds.data.dataset import Dataset
from megatron_ds.data.held_out import HeldOut
from megatron_ds.data.indexed.open import open_indexed, open_indexed_documents
from megatron_ds.data.labelled.open import open_labelled
from megatron_ds.data.labelled.rows import FIELDS as LABELLED_FIELDS
from megatron_ds.data.long_context.open import LongContext, OpenDocuments
from megatron_ds.data.mixture import Weights
from megatron_ds.data.objective import DataObjective, Labelled
from megatron_ds.data.readers.examples import TEXT_COLUMN
from megatron_ds.data.readers.placeholders import NO_PLACEHOLDERS, Placeholders
from megatron_ds.data.readers.source import Source, as_source
from megatron_ds.data.readers.sources import find_source
from megatron_ds.data.request import DatasetRequest, Order, Split
from megatron_ds.data.text.documents import TextSource
from megatron_ds.data.text.open import open_text, open_text_documents
from megatron_ds.data.tokenized.open import open_tokenized
from megatron_ds.data.tokenized.validation import FIELDS as TOKENIZED_FIELDS
from megatron_ds.errors import ConfigError, DataError, not_one_of, show
from megatron_ds.registry import Registry


@dataclass(frozen=True)
class DataFormat:
    """A format of training data.

    Attributes:
        open: returns the dataset of a request's sources, one after the other. Called on every rank, without
            communication; raises DataError. Blends are made of one dataset for each source.
        keys: keys of the `data` section that this format heeds and not every format does, such as `packing`.
        options: keys that the format takes under `data.options`; None = none. Those that are also in `keys` are taken
            from the `data` section itself.
        needs_tokenizer: whether `tokenizer_path` must be set.
        streams: whether it reads each row once, so that data sets on the hub can be streamed.
        cuts_spans: whether it cuts spans out of text for sequence-to-sequence models, with the objective's `mask_rate`
            and `mean_span`; otherwise these keys are refused for such models.
        has_labels: whether its samples have the labels of models with a label head, for which other formats are
            refused, and no labels of others.
        fields: names of the fields that it reads, for formats that read rows with fields; the first one is that which
            `column` of a source names. None = it reads no such rows: `data.columns`, `data.bad_rows` and the name,
            split and column of a source do nothing. Empty = every field may be read.
        check_source: raises DataError where a source is missing. Called for every source of a blend before the first
            is opened, so that no time is lost; None = `open` checks.
        find: the same, called with all that is set for the source.
        open_documents: returns the documents of a request's sources, for formats with `data.long_context`; None = the
            format does not take that key.
    """

    open: Callable[[DatasetRequest], Dataset]
    keys: tuple[str, ...] = ()
    options: type[Section] | None = None
    needs_tokenizer: bool = False
    streams: bool = False
    cuts_spans: bool = False
    has_labels: bool = False
    fields: tuple[str, ...] | None = None
    check_source: Callable[[str], object] | None = None
    find: Callable[[Source], object] | None = None
    open_documents: OpenDocuments | None = None

    def __post_init__(self) -> None:
        for key in self.keys:
            if key not in DataSection.model_fields:
                raise ConfigError(f"DataFormat.keys: data.{key} {not_one_of(key, DataSection.model_fields)}")


FORMATS: Registry[DataFormat] = Registry("data format")
FORMATS.register(
    "text",
    DataFormat(
        open_text,
        keys=("bos", "long_context"),
        needs_tokenizer=True,
        streams=True,
        cuts_spans=True,
        fields=(TEXT_COLUMN,),
        find=TextSource,
        open_documents=open_text_documents,
    ),
)
FORMATS.register(
    "chat",
    DataFormat(
        open_chat,
        keys=tuple(ChatOptions.model_fields),
        options=ChatOptions,
        needs_tokenizer=True,
        fields=CHAT_FIELDS,
        find=partial(find_source, plain_text=False),
    ),
)
FORMATS.register(
    "tokenized", DataFormat(open_tokenized, fields=TOKENIZED_FIELDS, find=partial(find_source, plain_text=False))
)
FORMATS.register(
    "indexed",
    DataFormat(open_indexed, keys=("split", "long_context"), open_documents=open_indexed_documents),
)
FORMATS.register(
    "labelled",
    DataFormat(
        open_labelled,
        needs_tokenizer=True,
        has_labels=True,
        fields=LABELLED_FIELDS,
        find=partial(find_source, plain_text=False),
    ),
)


def check_format(data: DataSection, tokenizer_path: str | None) -> None:
    """Check that a `data` section fits its format, without reading any data.

    Args:
        data: section of the run file.
        tokenizer_path: directory of the run's tokenizer, or None.

    Raises:
        ConfigError: the format is not registered, lacks a tokenizer, does not heed a key that is set, or does not take
            the options.
    """
    chosen = FORMATS.get(data.format, "data.format")
    if chosen.needs_tokenizer and tokenizer_path is None:
        raise ConfigError(
            f"model.tokenizer is missing: data.format={data.format} with model.config needs one; "
            "give the directory of a tokenizer, or use data.format=tokenized"
        )
    heeded = (*chosen.keys, *(("packing",) if data.long_context is not None else ()))
    for name, other in FORMATS.items():
        for key in other.keys:
            value = getattr(data, key)
            if key not in heeded and value != DataSection.model_fields[key].default:
                raise ConfigError(
                    f"data.{key}={show(value)} does nothing with data.format={data.format}; remove it, or use "
                    f"data.format={name}"
                )
    _check_reading(data, chosen)
    format_options(data)


def check_labels(format: str, objective: DataObjective) -> None:
    """Check that a format has the labels of a model with a label head, and that others get none.

    Raises:
        ConfigError: only one of the two is about labels.
    """
    has_labels = FORMATS.get(format, "data.format").has_labels
    if isinstance(objective, Labelled) and not has_labels:
        raise ConfigError(
            f"data.format={format} has no labels, and the model has a label head; try data.format=labelled, or a model "
            "without that head"
        )
    if has_labels and not isinstance(objective, Labelled):
        raise ConfigError(
            f"data.format={format} is for models with a label head, and this one has none; try model.head={{labels: "
            "[...]}, which gives it a new one, or another data.format"
        )


def _check_reading(data: DataSection, chosen: DataFormat) -> None:
    """Check the keys about the fields and rows of sources."""
    places = [(f"data.{part}[{n}]", one) for part in ("train", "valid") for n, one in enumerate(getattr(data, part))]
    settings = [(f"{place}.{key}", getattr(one, key)) for place, one in places for key in ("name", "split", "column")]
    settings += [("data.columns", data.columns or None), ("data.bad_rows", _none_if(data.bad_rows, "refuse"))]
    for field, value in settings:
        if value is not None and chosen.fields is None:
            others = " or ".join(name for name, other in FORMATS.items() if other.fields is not None)
            raise ConfigError(
                f"{field}={show(value)} does nothing with data.format={data.format}, which has no fields; remove it, "
                f"or use data.format={others}"
            )
    for place, one in places:
        if one.streaming and not chosen.streams:
            readers = " or ".join(name for name, other in FORMATS.items() if other.streams)
            raise ConfigError(
                f"{place}.streaming=true is not for data.format={data.format}, which reads its rows again; remove it, "
                f"or use data.format={readers}"
            )
    for name in data.columns:
        if chosen.fields and name not in chosen.fields:
            theirs = data.columns[name]
            if theirs in chosen.fields:
                raise ConfigError(
                    f"data.columns.{name}={theirs}: our name comes first; try data.columns.{theirs}={name}"
                )
            raise ConfigError(f"data.columns.{name}: {name} {not_one_of(name, chosen.fields)}")


def _none_if(value: str, default: str) -> str | None:
    return None if value == default else value


def format_sources(data: DataSection, sources: Sequence[DataSource]) -> list[Source]:
    """Return sources of a `data` section with all that is set for their rows."""
    fields = FORMATS.get(data.format, "data.format").fields or ()
    return [
        Source(
            one.path,
            one.name,
            one.split,
            tuple(sorted({**data.columns, **({fields[0]: one.column} if one.column is not None else {})}.items())),
            data.bad_rows == "skip",
            one.streaming,
        )
        for one in sources
    ]


def format_options(data: DataSection) -> Section | None:
    """Return the options of a run's data format; None where the format takes none.

    Raises:
        ConfigError: `data.options` holds a key or a value that the format does not take.
    """
    chosen = FORMATS.get(data.format, "data.format")
    options = chosen.options
    if data.options and (options is None or options.model_fields.keys() <= set(chosen.keys)):
        raise ConfigError(f"data.options={show(data.options)} does nothing with data.format={data.format}; remove it")
    if options is None:
        return None
    for key in data.options:
        if key in chosen.keys:
            raise ConfigError(f"data.options.{key}: unknown key; did you mean data.{key}?")
    values = {key: getattr(data, key) for key in chosen.keys if key in options.model_fields}
    try:
        return options.model_validate({**values, **data.options})
    except ValidationError as error:
        raise ConfigError(f"data.options.{explain(error, options)}") from None


def open_dataset(
    format: str,
    objective: DataObjective,
    sources: Sequence[str | Source],
    seq_length: int,
    vocab_size: int,
    tokenizer_path: str | None = None,
    cache_dir: str | None = None,
    *,
    weights: Weights | None = None,
    order: Order | None = None,
    split: Split | None = None,
    options: Section | None = None,
    held_out: HeldOut | None = None,
    placeholders: Placeholders = NO_PLACEHOLDERS,
    long_context: LongContext | None = None,
) -> Dataset:
    """Open the samples of `sources`, concatenated in the order given or blended, checked against the model.

    Called on every rank; does not communicate. Arguments that are not listed are `DatasetRequest`'s.

    Args:
        format: a name in FORMATS.
        sources: a text is the path of a source.
        cache_dir: directory for tokens and orders that are computed once; None = `default_cache_dir()`.
        weights: of the sources in a blend; None = one source after the other.
        options: None = the format's defaults.
        held_out: the part of the samples that is read where a share is held out for validation; None = all.
        long_context: the mix of lengths; None = documents of all lengths as they come.

    Raises:
        ConfigError: no format of that name, or it does not fit the objective.
        DataError: a source or the tokenizer is missing, malformed or does not fit the model.
    """
    if not sources:
        raise DataError("data: no sources; name at least one file, directory or hub id under data.train")
    check_labels(format, objective)
    chosen = FORMATS.get(format, "data.format")
    if chosen.needs_tokenizer and tokenizer_path is None:
        raise DataError(
            f"model.tokenizer is not set, but data.format={format} needs it; point it at a tokenizer directory"
        )
    directory = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
    if options is None and chosen.options is not None:
        options = chosen.options()
    inputs = tuple(as_source(source) for source in sources)
    request = DatasetRequest(
        inputs, objective, seq_length, vocab_size, tokenizer_path, directory, order, split, options, placeholders
    )
    open_one = chosen.open if held_out is None else partial(held_out.open, open_one=chosen.open)
    if long_context is not None:
        assert chosen.open_documents is not None, f"data.format={format} has no mix of lengths"
        open_one = partial(long_context.open, open_documents=chosen.open_documents, held_out=held_out)
    try:
        if weights is None:
            return open_one(request)
        for source in inputs:
            if chosen.check_source is not None:
                chosen.check_source(source.path)
            if chosen.find is not None:
                chosen.find(source)
        return open_blend(request, weights, open_one)
    except OSError as error:
        raise DataError(f"data: {', '.join(request.sources)}: cannot be read ({error})") from error


def default_cache_dir() -> Path:
    """Return the directory of cached tokens of runs that do not set `data.cache_dir`."""
    return cache_folder("tokens")
