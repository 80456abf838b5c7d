"""The section of the run file about data."""

from datetime import date
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_serializer, model_validator

from megatron_ds.config.mixture_start import MixtureStart, parse_start
from megatron_ds.config.schema_base import (
    VARIANT,
    Count,
    CountOrZero,
    NonNegative,
    PathText,
    Section,
    Text,
    integral_float_to_int,
)
from megatron_ds.errors import ConfigError, show

DEFAULT_DATE = "2024-07-26"
"""The date that chat templates write as today's: the one that Llama 3's template falls back to."""


def _iso_date(value: Any) -> Any:
    """Return a date, which YAML may have parsed, as YYYY-MM-DD."""
    if isinstance(value, date):
        return value.isoformat()[:10]
    try:
        return date.fromisoformat(value).isoformat()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"data.date={show(value)} is not a date; write it as {DEFAULT_DATE}") from error


def _list_of_sources(value: Any) -> Any:
    """Return a list of sources: a single source as a list of one, plain paths as mappings."""
    entries = value if isinstance(value, list | tuple) else [value]
    return [e if isinstance(e, dict | DataSource) else {"path": e} for e in entries if e is not None]


def _begin(value: Any) -> Any:
    if value != "auto" and not isinstance(value, bool):
        raise ConfigError(f"data.bos={show(value)} is not one of auto, true, false")
    return value


def _skip_for_drop(value: Any) -> Any:
    return "skip" if value == "drop" else value


def _lengths_to_shares(value: Any) -> Any:
    """Return a mapping from lengths to shares with integers as keys, the shortest first."""
    if not isinstance(value, dict):
        return value
    shares = {_length(key): share for key, share in value.items()}
    return dict(sorted(shares.items()))


def _length(key: Any) -> int:
    number = integral_float_to_int(key)
    if isinstance(key, str):  # of an override, data.long_context.4096=0.7
        number = int(key) if key.isascii() and key.isdigit() else key
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise ConfigError(
            f"data.long_context has the key {show(key)}, which is no length in tokens; write {{0: 0.3, 4096: 0.7}}"
        )
    return number


_FIRST = (MixtureStart(0), MixtureStart(None, 0))


def _changing_weight(value: Any) -> Any:
    """Return a weight; one that changes with the keys as numbers of steps, or as texts of numbers of tokens."""
    if not isinstance(value, dict):
        return value
    starts = {key: parse_start(key) for key in value}
    twice = [key for key, start in starts.items() if list(starts.values()).count(start) > 1]
    if twice:
        both = " and ".join(map(show, twice[:2]))
        raise ConfigError(f"data.train: weight has the keys {both}, which are the same time; keep one")
    return {start.step if start.step is not None else key: value[key] for key, start in starts.items()}


Weight = Annotated[
    Annotated[float, Field(gt=0), Tag(f"{VARIANT}number")]
    | Annotated[dict[int | str, NonNegative], Field(min_length=1), Tag(f"{VARIANT}mapping")],
    Discriminator(lambda value: f"{VARIANT}{'mapping' if isinstance(value, dict) else 'number'}"),
]


class DataSource(Section):
    """One file, directory, pattern, hub id or prefix.

    `name`: the configuration of a data set on the hub. `split`: of a data set, as `datasets` takes it. `column`: the
    field that holds the text, the messages or the token ids. `weight`: the relative weight in a blend, or its weights
    from certain numbers of steps or tokens on. `streaming`: a data set on the hub is read as a stream while it is
    tokenized, and not kept on the disk. `set`: the name of the validation set that it belongs to.
    """

    path: PathText
    name: Text | None = None
    split: Text | None = None
    column: Text | None = None
    weight: Annotated[Weight | None, BeforeValidator(_changing_weight)] = None
    streaming: bool = False
    set: Text | None = None

    @property
    def label(self) -> str:
        """The source in a few words, for messages."""
        chosen = [f"{key} {value}" for key in ("name", "split", "column") if (value := getattr(self, key)) is not None]
        return f"{self.path} ({', '.join(chosen)})" if chosen else self.path

    @property
    def plain(self) -> str | dict[str, Any]:
        """The source as it is written in a run file."""
        given = self.model_dump(exclude_defaults=True)
        return given if len(given) > 1 else self.path


class DataSection(Section):
    """The training and validation data, and how samples are made from them.

    `valid_share`: the share of the training samples that is held out for validation; the run file may write it
    `valid: {share: ...}`. `columns`: our names of fields, each with its name in the data. `bad_rows`: refuse a
    source that holds a row without a usable example, or leave such rows out. `bos`: whether each document of text
    begins with special tokens ("auto": those that the tokenizer puts before a text). `cache_dir`: the directory of
    tokenized text (None: a per-user cache directory). `mask_rate` and `whole_words` are for masked models;
    `mask_rate`, `mean_span` and `target_length` (None: chosen) for sequence-to-sequence models. `restart`: a
    resumed run accepts data that differ from the earlier ones, and starts at their beginning. `split`: fractions of
    each indexed corpus for training, validation and neither. `loss_on`, `loss_turns`, `date` (that chat templates
    write as today's) and `overlong` are for conversations. `packing`: documents or conversations in a sample do not
    attend to one another. `long_context`: least length of a document in tokens -> share of the samples that come from
    documents of that length, up to the next. `prefetch`: the number of batches that are read ahead. `options`: keys of
    a format from another package. The names of formats, and the keys that each one reads, are checked in
    `megatron_ds.data.formats`.
    """

    format: Text = "text"
    train: Annotated[list[DataSource], BeforeValidator(_list_of_sources), Field(min_length=1)]
    valid: Annotated[list[DataSource], BeforeValidator(_list_of_sources)] = []
    valid_share: Annotated[float, Field(gt=0, lt=1)] | None = None
    columns: dict[Text, Text] = {}
    bad_rows: Annotated[Literal["refuse", "skip"], BeforeValidator(_skip_for_drop)] = "refuse"
    seq_length: Count = 512
    bos: Annotated[Literal["auto"] | bool, BeforeValidator(_begin)] = "auto"
    shuffle: bool = True
    cache_dir: PathText | None = None
    mask_rate: Annotated[float, Field(gt=0, lt=1)] = 0.15
    whole_words: bool = False
    mean_span: Annotated[float, Field(ge=1)] = 3.0
    target_length: Count | None = None
    restart: bool = False
    split: list[NonNegative] | None = None
    loss_on: Literal["assistant", "all"] = "assistant"
    loss_turns: Literal["all", "last"] = "all"
    date: Annotated[Text, BeforeValidator(_iso_date)] = DEFAULT_DATE
    overlong: Literal["refuse", "drop", "cut"] = "refuse"
    packing: bool = False
    long_context: Annotated[dict[int, float], BeforeValidator(_lengths_to_shares), Field(min_length=1)] | None = None
    prefetch: CountOrZero = 2
    options: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _share_of_training(cls, data: Any) -> Any:
        valid = data.get("valid") if isinstance(data, dict) else None
        _check_valid_is_no_number(valid)
        if isinstance(valid, list) and len(valid) == 1 and isinstance(valid[0], dict) and "share" in valid[0]:
            share = show(valid[0]["share"])
            raise ConfigError(f"data.valid[0].share={share} is in a list; write data.valid={{share: {share}}}")
        if isinstance(valid, dict) and not valid.keys() & {"share", *DataSource.model_fields}:
            return {**data, "valid": _named_sources(valid)}
        if not isinstance(valid, dict) or "share" not in valid:
            return data
        others = [key for key in valid if key != "share"]
        if others or data.get("valid_share") is not None:
            other = f"data.valid.{others[0]}" if others else "data.valid_share"
            raise ConfigError(f"data.valid.share={show(valid['share'])} and {other} are both set; keep one")
        if valid["share"] is None:
            raise ConfigError("data.valid.share is empty; give it a number, for example data: {valid: {share: 0.01}}")
        return {**data, "valid": [], "valid_share": valid["share"]}

    @model_validator(mode="after")
    def _check_consistency(self) -> "DataSection":
        _check_weights(self)
        _check_sets(self)
        _check_share(self)
        _check_split(self)
        _check_shares(self)
        if self.loss_on == "all" and self.loss_turns == "last":
            raise ConfigError(
                "data.loss_on=all puts loss on every token, data.loss_turns=last on the assistant's last turn; "
                "remove one of them"
            )
        return self

    @property
    def valid_sets(self) -> dict[str, list[DataSource]]:
        """The validation sources by the name of their set; without names all are in one set with an empty name."""
        found: dict[str, list[DataSource]] = {}
        for source in self.valid:
            found.setdefault(source.set or "", []).append(source)
        return found

    @field_serializer("train", "valid")
    def _plain_sources(self, sources: list[DataSource]) -> list[Any]:
        return [source.plain for source in sources]


def _named_sources(sets: dict[Any, Any]) -> list[Any]:
    """Return the sources of named validation sets, each with the name of its set."""
    found = []
    for name, sources in sets.items():
        if sources in (None, []):
            raise ConfigError(f"data.valid.{name} is empty; give it at least one source, or remove it")
        for source in _list_of_sources(sources):
            fields = source.model_dump(exclude_defaults=True) if isinstance(source, DataSource) else source
            own = fields.get("set", str(name))
            if own != str(name):
                raise ConfigError(f"data.valid.{name} has a source with set={show(own)}; remove its set")
            found.append({**fields, "set": str(name)})
    return found


def _check_valid_is_no_number(valid: Any) -> None:
    """Check that `data.valid` or its only key is no number, which is meant as the share to hold out."""
    key, value = "", valid
    if isinstance(valid, dict) and len(valid) == 1 and "share" not in valid:
        ((name, number),) = valid.items()
        if not isinstance(number, bool):
            key, value = f".{name}", number
    if isinstance(value, int | float):
        share = value if 0 < value < 1 else 0.01
        raise ConfigError(
            f"data.valid{key}={show(value)} names no data; to hold out a share of data.train, write "
            f"data.valid={{share: {share:g}}}"
        )


def _check_weights(data: DataSection) -> None:
    """Check that each source of a blend has a weight, and that validation sources have none."""
    without = [number for number, source in enumerate(data.train) if source.weight is None]
    if without and len(without) < len(data.train):
        raise ConfigError(
            f"data.train[{without[0]}].weight is missing, and other sources have one; give all of them one, or none"
        )
    for number, source in enumerate(data.train):
        _check_changing_weight(source.weight, f"data.train[{number}].weight")
    for number, source in enumerate(data.valid):
        if source.weight is not None:
            raise ConfigError(
                f"data.valid[{number}].weight={show(source.weight)} does nothing: validation reads every sample once; "
                "remove it"
            )


def _check_sets(data: DataSection) -> None:
    """Check that either all validation sources are in named sets or none is, and that no training source is."""
    for number, source in enumerate(data.train):
        if source.set is not None:
            raise ConfigError(
                f"data.train[{number}].set={show(source.set)} does nothing: sets are for data.valid; remove it"
            )
    unnamed = [number for number, source in enumerate(data.valid) if source.set is None]
    if unnamed and len(unnamed) < len(data.valid):
        raise ConfigError(
            f"data.valid[{unnamed[0]}].set is missing, and other sources have one; give all of them one, or none"
        )


def _check_changing_weight(weight: float | dict[int | str, float] | None, field: str) -> None:
    """Check that a weight that changes has one from the first sample on, and is not 0 throughout."""
    if not isinstance(weight, dict):
        return
    if not any(parse_start(key) in _FIRST for key in weight):
        given = ", ".join(f"{key}: {value:g}" for key, value in weight.items())
        raise ConfigError(f"{field}={show(weight)} has no weight for the first steps; try {{0: 0, {given}}}")
    if not any(weight.values()):
        raise ConfigError(f"{field}={show(weight)} is always 0; leave the source out")


def _check_share(data: DataSection) -> None:
    if data.valid_share is None:
        return
    setting = f"data.valid_share={data.valid_share:g} holds out a share of data.train"
    if data.valid:
        raise ConfigError(f"{setting}, and data.valid names other data; keep one")
    if data.split is not None:
        raise ConfigError(f"{setting}, and data.split={show(data.split)} does too; keep one")


def _check_shares(data: DataSection) -> None:
    """Check that the shares of a mix of lengths are all of the samples."""
    shares = data.long_context
    if shares is None:
        return
    for least, share in shares.items():
        if share <= 0:
            raise ConfigError(f"data.long_context.{least}={share:g} must be more than 0; try without it")
    total = sum(shares.values())
    if abs(total - 1) > 1e-6:
        scaled = ", ".join(f"{least}: {share / total:.4g}" for least, share in shares.items())
        raise ConfigError(
            f"data.long_context={show(shares)}: the shares add up to {total:.6g} instead of 1; nearest: {{{scaled}}}"
        )


def _check_split(data: DataSection) -> None:
    split = data.split
    if split is None:
        return
    setting = f"data.split={show(split)}"
    if data.valid:
        raise ConfigError(f"{setting} takes validation data from data.train, and data.valid names others; keep one")
    if len(split) not in (2, 3) or split[0] == 0:
        raise ConfigError(
            f"{setting} is not two or three fractions: training, validation, unused; write data.split=[0.97, 0.03]"
        )
