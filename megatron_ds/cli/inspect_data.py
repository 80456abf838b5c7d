"""`megatron-ds inspect` for data: facts in rows, lengths as bars, and samples as text with spans under loss marked."""

from __future__ import annotations

import json as json_module
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from megatron_ds.cli.table import Row, count, show_rows, size

if TYPE_CHECKING:
    from megatron_ds.config import RunConfig
    from megatron_ds.data.inspect.facts import IndexedFacts, RunDataFacts, TextFileFacts
    from megatron_ds.data.inspect.histogram import LengthHistogram
    from megatron_ds.data.inspect.mix import BandUse
    from megatron_ds.data.inspect.rendering import RenderedDocument, RenderedSample

BAR_CELLS = 30
EIGHTHS = " ▏▎▍▌▋▊▉█"
LOSS_STYLE, NO_LOSS_STYLE = "bold green", "dim"
MOST_CLASSES = 40  # that are shown
OF_SAMPLES = ("label", "label_scores")  # columns of labels of a sample as a whole
MARKS = ("⟦", "⟧")
# Control characters are shown as their Unicode control pictures, except for newlines and tabs.
PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421, 0x9B: 0x241B}


def run(path: Path, overrides: Sequence[str], samples: int, json: bool) -> bool:
    """Show the training data of a run, opened as `train` opens them. Return True: nothing is checked."""
    from megatron_ds.config import load_run
    from megatron_ds.log import quiet_libraries

    quiet_libraries()
    from megatron_ds.data import GlobalBatches
    from megatron_ds.data.inspect.facts import inspect_run_data
    from megatron_ds.training.datasets import open_data
    from megatron_ds.training.resolve import resolve_run
    from megatron_ds.training.statement import describe_run

    config = load_run(path, overrides).without_choices()
    least = config.parallel.least_ranks
    resolved, data, valid = open_data(resolve_run(config, least, "cuda"))  # any device: nothing is computed
    config = resolved.run
    section = config.train
    shuffle = config.data.shuffle and not data.ordered
    order = GlobalBatches(len(data), section.global_batch_size, section.seed, shuffle)
    facts = inspect_run_data(data, valid, order, resolved.objective.data, resolved.run.model.tokenizer_path, samples)
    statement = describe_run(resolved.run, data, valid, resolved.label_columns)
    if json:
        facts_of_run = {
            "run": str(path),
            "format": config.data.format,
            "steps": section.num_steps,
            "statement": statement,
        }
        _print_json({**facts_of_run, **asdict(facts)})
        return True
    show_rows(_run_rows(path, config, facts, statement))
    _show_samples("sample", facts.shown, marked=True)
    return True


def indexed(path: Path, fast: bool, tokenizer: str | None, samples: int, json: bool) -> bool:
    """Show a pair of indexed files. Return True if they match their manifest."""
    from megatron_ds.log import quiet_libraries

    quiet_libraries()
    from megatron_ds.data.inspect.facts import inspect_indexed

    facts = inspect_indexed(str(path), fast=fast, tokenizer_path=tokenizer, num_shown=samples)
    if json:
        _print_json(asdict(facts))
    else:
        show_rows(_indexed_rows(facts))
        _show_samples("document", facts.shown, marked=False)
    return not facts.problems


def file(path: Path, tokenizer: str | None, samples: int, json: bool, skip_bad: bool) -> bool:
    """Show files of text, conversations or labelled rows. Return True: nothing is checked."""
    from megatron_ds.log import quiet_libraries

    quiet_libraries()
    from megatron_ds.data.inspect.facts import inspect_file

    if tokenizer is None:
        raise typer.BadParameter(f"{path} is text and is shown as tokens; add --tokenizer DIR")
    facts = inspect_file(str(path), tokenizer, samples, skip_bad=skip_bad)
    if json:
        _print_json(asdict(facts))
        return True
    show_rows(_file_rows(facts))
    name = {"chat": "conversation", "labelled": "row"}.get(facts.format, "document")
    _show_samples(name, facts.shown, marked=facts.format != "text")
    return True


def _print_json(content: Mapping[str, Any]) -> None:
    print(json_module.dumps(content, indent=2))


def _run_rows(path: Path, config: RunConfig, facts: RunDataFacts, statement: Mapping[str, str]) -> Iterator[Row]:
    size, positions = facts.global_batch_size, facts.positions
    yield ("run", str(path))
    yield ("data", f"{config.data.format}: {facts.training}")
    yield ("valid", facts.validation or "none")
    yield ("columns", ", ".join(facts.columns))
    steps, epochs = config.train.num_steps, config.train.num_samples / facts.samples
    order = "shuffled" if config.data.shuffle else "in order"
    sizes = f"{config.train.batch_sizes.at(1):,} to {size:,}" if config.train.batch_ramp is not None else f"{size:,}"
    yield ("order", f"{order}; {steps:,} steps of {sizes} read {epochs:,.2f} times {facts.samples:,} samples")
    exactly = "" if facts.looked_at == facts.samples else f", measured on {facts.looked_at:,} samples"
    if facts.label_column in OF_SAMPLES:
        yield ("loss", f"on {facts.learned * size:,.1f} labels of a step's {size:,} samples{exactly}")
    else:
        yield (
            "loss",
            f"on {facts.learned:,.1f} of a sample's {positions:,} positions ({facts.learned / positions:.1%}), on "
            f"{facts.learned * size:,.0f} of a step's {size * positions:,}{exactly}",
        )
    yield from _class_rows(facts.classes)
    yield from _mix_rows(facts.mix)
    yield from statement.items()
    yield from _bad_rows(facts)
    yield ("fingerprint", facts.fingerprint[:12])
    if facts.lengths is not None:
        yield from _length_rows(facts.lengths)


def _indexed_rows(facts: IndexedFacts) -> Iterator[Row]:
    yield ("prefix", facts.prefix)
    sequences = f" in {facts.sequences:,} sequences" if facts.sequences != facts.documents else ""
    yield ("documents", f"{facts.documents:,}{sequences}")
    yield ("tokens", f"{facts.tokens:,} ({count(facts.tokens)}), {facts.dtype}")
    yield ("files", f".bin {size(facts.tokens_bytes)}, .idx {size(facts.index_bytes)}")
    if facts.manifest is None:
        yield ("manifest", "none; the files cannot be verified")
    else:
        yield from _manifest_rows(facts.manifest)
        if not facts.problems:
            yield ("intact", "all checksums match" if facts.checked else "by file lengths (--fast)")
    yield from (("DAMAGED", problem) for problem in facts.problems)
    if facts.lengths is not None:
        yield from _length_rows(facts.lengths)


def _manifest_rows(manifest: Mapping[str, Any]) -> Iterator[Row]:
    """Yield what the manifest records about the files; all of its keys are optional."""
    for source in manifest.get("sources") or ():
        yield ("source", str(source.get("name", source)) if isinstance(source, dict) else str(source))
    tokenizer = manifest.get("tokenizer")
    if tokenizer:
        yield ("tokenizer", str(tokenizer.get("path", tokenizer)) if isinstance(tokenizer, dict) else str(tokenizer))
    if "largest_id" in manifest:
        yield ("largest id", f"{manifest['largest_id']:,}")
    bad = (manifest.get("bad_lines") or {}).get("count")
    if bad:
        yield ("bad lines", f"{bad:,} skipped")


def _file_rows(facts: TextFileFacts) -> Iterator[Row]:
    yield ("file", f"{facts.path}, {size(facts.bytes)}")
    total = facts.lengths.total
    loss = f", {facts.learned:,} of them with loss ({facts.learned / max(1, total):.1%})"
    total_text = f"{facts.lengths.count:,} {facts.lengths.what}, {total:,} tokens"
    yield (facts.format, total_text + (loss if facts.format == "chat" else ""))
    yield from _class_rows(facts.classes)
    yield from _bad_rows(facts)
    yield from (("note", note) for note in facts.notes)
    yield from _length_rows(facts.lengths)


def _class_rows(classes: Mapping[str, int]) -> Iterator[Row]:
    """Yield a row for each class, the most frequent first."""
    total = max(1, sum(classes.values()))
    counts = sorted(classes.items(), key=lambda item: -item[1])
    for name, number in counts[:MOST_CLASSES]:
        yield ("class", f"{name}: {number:,} ({number / total:.1%})")
    if len(counts) > MOST_CLASSES:
        yield ("", f"... and {len(counts) - MOST_CLASSES:,} more")


def _mix_rows(mix: Sequence[BandUse]) -> Iterator[Row]:
    """Yield a row for each band of document lengths."""
    for band in mix:
        yield (
            "mix",
            f"{band.share:.1%} from {band.name}: {band.documents:,} documents, {count(band.tokens)} tokens, "
            f"{band.samples:,} samples ({band.whole:,} of one document); the run reads {band.taken:,}, "
            f"{band.epochs:.2f} epochs",
        )


def _bad_rows(facts: RunDataFacts | TextFileFacts) -> Iterator[Row]:
    if facts.num_bad_rows:
        more = "" if len(facts.bad_rows) == facts.num_bad_rows else f", the first {len(facts.bad_rows)}"
        yield ("bad rows", f"{facts.num_bad_rows:,} left out{more}:")
        yield from (("", one) for one in facts.bad_rows)


def _length_rows(lengths: LengthHistogram) -> Iterator[Row]:
    yield (
        "lengths",
        f"of {lengths.what}: {lengths.shortest:,} to {lengths.longest:,} tokens, median "
        f"{f'{lengths.median:,.1f}'.removesuffix('.0')}, mean {lengths.total / lengths.count:,.1f}",
    )
    if lengths.long:
        held = ", ".join(f"{part:.1%} of {least:,} or more" for least, part in lengths.long)
        yield ("long", f"all tokens by the length of their {lengths.what.removesuffix('s')}: {held}")
    if lengths.shortest < lengths.longest:
        yield from (("", line) for line in bars(lengths))


def bars(lengths: LengthHistogram) -> Iterator[str]:
    """Yield one line per bar: range of lengths, bar, count, and fraction of all."""
    most = max(bar.count for bar in lengths.bars)
    first, last = (max(len(f"{getattr(bar, end):,}") for bar in lengths.bars) for end in ("first", "last"))
    number = len(f"{most:,}")
    for bar in lengths.bars:
        eighths = -(-bar.count * BAR_CELLS * 8 // most)  # rounded up: a bar that is not empty is visible
        drawn = (EIGHTHS[8] * (eighths // 8) + EIGHTHS[eighths % 8]).strip()
        part = f"{bar.count / lengths.count:.1%}"
        yield f"{bar.first:>{first},} - {bar.last:>{last},}  {drawn:<{BAR_CELLS}}  {bar.count:>{number},}  {part:>6}"


def _show_samples(name: str, samples: Sequence[RenderedSample], marked: bool) -> None:
    """Print samples one after the other, each with its documents."""
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = Console(highlight=False)
    for sample in samples:
        print()
        console.print(Text(_describe_sample(name, sample, marked), style="bold"), soft_wrap=True)
        for place, document in enumerate(sample.documents, start=1):
            if len(sample.documents) > 1:
                title = document.name or f"document {place}"
                learned = f", {document.learned:,} with loss" if marked else ""
                console.print(Text(f"  {title}: {document.tokens:,} tokens{learned}"), soft_wrap=True)
            if console.is_terminal:
                console.print(Padding(_styled(document, marked), (0, 0, 0, 4)))
            else:
                for line in _plain(document).split("\n"):
                    print(f"  │ {line}".rstrip())
            if document.hidden:
                print(f"  ... and {document.hidden:,} more tokens")


def _describe_sample(name: str, sample: RenderedSample, marked: bool) -> str:
    documents = sample.documents
    number = f" in {len(documents)} documents" if len(documents) > 1 else ""
    padding = f", {sample.padding:,} positions of padding" if sample.padding else ""
    learned = f", {sum(one.learned for one in documents):,} with loss" if marked else ""
    told = f", label {sample.label}" if sample.label else learned
    return f"{name} {sample.index:,}: {sum(one.tokens for one in documents):,} tokens{number}{told}{padding}"


def _styled(document: RenderedDocument, marked: bool) -> Any:
    from rich.text import Text

    text = Text()
    for piece in document.pieces:
        style = (LOSS_STYLE if piece.learned else NO_LOSS_STYLE) if marked else ""
        text.append(piece.text.translate(PICTURES), style)
    return text


def _plain(document: RenderedDocument) -> str:
    texts = [(piece.text.translate(PICTURES), piece.learned) for piece in document.pieces]
    return "".join(f"{MARKS[0]}{text}{MARKS[1]}" if learned else text for text, learned in texts)
