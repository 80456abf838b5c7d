"""Published training runs as the planner predicts them: `python -m tests.planner.published [FILE.yaml]`.

Every row of a file in the format of `published-runs.yaml` is predicted from its model's sizes, its layout, its device
and the settings of its system. Only iteration seconds and tokens per second are compared, never printed TFLOP/s.
`--docs docs/planning.md` writes the tables of the section "Published runs" instead.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from megatron_ds.errors import MegatronDSError
from megatron_ds.planner.timing.step_time import StepTime
from tests.planner.published_memory import GIB, memory_of, published_gib
from tests.planner.published_rows import ROWS, Row, derived_s, published_s, read_rows, why_left_out
from tests.planner.published_step import predict
from tests.planner.published_systems import setting_of

NEAR = 0.15
"""An error up to which a prediction is near."""
BEGIN, END = "<!-- published runs: written by tests.planner.published -->", "<!-- end of published runs -->"
MEMORY_NOTE = (
    "For information: state and activations of the first pipeline rank. What is published is the split of the paper "
    "(Korthikanti), nvidia-smi's maximum with context, buffers and freed memory (BigScience), or the peak of torch's "
    "allocator (torchtitan)."
)
GROUPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Narayanan et al. 2021", ("narayanan21",)),
    ("Korthikanti et al. 2022", ("korthikanti22",)),
    ("MT-NLG (Smith et al. 2022)", ("mtnlg",)),
    ("BigScience's Megatron-DeepSpeed", ("bigscience",)),
    ("Megatron-LM on A100 by MegaScale (Jiang et al. 2024)", ("megascale",)),
    ("H100, Megatron: NeMo, Megatron-Bridge, NVIDIA's benchmarks", ("nemo", "mbridge", "dgxc", "megatron-h100")),
    ("FSDP: LLM Foundry, torchtitan", ("llmfoundry", "torchtitan")),
)
"""Title of a table -> beginnings of the ids of its rows; the first that fits. All other rows are in none."""


@dataclass(frozen=True)
class Prediction:
    """A row, predicted.

    Attributes:
        row: of the file.
        system: name of its system.
        time: its step.
        published_s: seconds of a step as published, by iteration time or by tokens per second.
    """

    row: Row
    system: str
    time: StepTime
    published_s: float

    @property
    def error(self) -> float:
        """Relative error of the predicted seconds."""
        return self.time.total_s / self.published_s - 1


def predictions(rows: Iterable[Row], refused: dict[str, str] | None = None) -> list[Prediction]:
    """Return predictions of all rows that can be compared; `refused` gets why others cannot be computed, by id."""
    found = []
    for row in rows:
        seconds = published_s(row)
        if seconds is None or why_left_out(row) is not None:
            continue
        try:
            found.append(Prediction(row, setting_of(row).system.name, predict(row), seconds))
        except MegatronDSError as error:
            if refused is None:
                raise
            refused[row["id"]] = str(error)
    return found


def derived(rows: Iterable[Row]) -> list[Prediction]:
    """Return predictions of rows whose seconds follow from a printed FLOP/s alone, for information."""
    found = []
    for row in rows:
        seconds = derived_s(row)
        if published_s(row) is None and seconds is not None and why_left_out(row, timed=False) is None:
            found.append(Prediction(row, setting_of(row).system.name, predict(row), seconds))
    return found


def summary(found: Sequence[Prediction]) -> str:
    """Return the median of the errors, and how many are at most 15 %."""
    errors = [abs(one.error) for one in found]
    near = sum(error <= NEAR for error in errors)
    share = f"{near} of them ({near / len(errors):.0%}) within {NEAR:.0%}"
    return f"{len(errors)} rows: median error {median(errors):.1%}, {share}"


def table(found: Sequence[Prediction], *, parts: bool = False) -> str:
    """Return a table in Markdown, with the seconds of each part if wanted."""
    head = ["run", "predicted s", "published s", "error", *(["parts, s"] if parts else [])]
    lines = [f"| {' | '.join(head)} |", "| --- | ---: | ---: | ---: |" + (" --- |" if parts else "")]
    for one in found:
        cells = [one.row["id"], f"{one.time.total_s:.2f}", f"{one.published_s:.2f}", f"{one.error:+.1%}"]
        if parts:
            cells.append(", ".join(f"{name} {value:.2f}" for name, value in one.time.parts.items()))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def memory_table(found: Sequence[Prediction]) -> str:
    """Return a table of the memory of those rows that have some."""
    lines = ["| run | state GiB | activations GiB | sum | published |", "| --- | ---: | ---: | ---: | ---: |"]
    for one in found:
        published = published_gib(one.row)
        if published is not None:
            memory = memory_of(one.row, one.time)
            state, kept = memory.state_bytes / GIB, memory.activation_bytes / GIB
            lines.append(f"| {one.row['id']} | {state:.1f} | {kept:.1f} | {state + kept:.1f} | {published:.1f} |")
    return "\n".join(lines)


def sections(rows: Sequence[Row], scored: Sequence[Prediction]) -> str:
    """Return the tables of the documentation, by group."""
    informed = derived(rows)
    lines = [f"All: {summary(scored)}."]
    for title, beginnings in GROUPS:
        some = [one for one in scored if one.row["id"].startswith(beginnings)]
        more = [one for one in informed if one.row["id"].startswith(beginnings)]
        lines.append(f"### {title}")
        if some:
            lines += [f"{summary(some)}.", table(some)]
        if more:
            lines += ["Derived from the printed FLOP/s, for information:", table(more)]
    lines += ["### Memory of published runs", MEMORY_NOTE, memory_table(scored)]
    left_out = [f"- {row['id']}: {why}" for row in rows if (why := why_left_out(row, timed=False)) is not None]
    lines += ["### Left out", "\n".join(left_out)]
    return "\n\n".join(lines)


def with_sections(page: str, rows: Sequence[Row], scored: Sequence[Prediction]) -> str:
    """Return a page of the documentation with its tables written anew, from rows and the predictions of them."""
    before, _, rest = page.partition(BEGIN)
    assert rest, f"the page has no line {BEGIN}"
    return f"{before}{BEGIN}\n\n{sections(rows, scored)}\n\n{END}{rest.partition(END)[2]}"


def show(path: Path) -> None:
    """Print predicted and published seconds of a file's rows, and why others are left out."""
    rows, refused = read_rows(path), dict[str, str]()
    found, groups = predictions(rows, refused), dict[str, list[Prediction]]()
    print(table(found, parts=True), end="\n\n")
    for one in found:
        groups.setdefault(one.system, []).append(one)
    for name, some in groups.items():
        print(f"{name}: {summary(some)}")
    if found:
        print(f"all: {summary(found)}", end="\n\n")
    for row in rows:
        why = why_left_out(row) or refused.get(row["id"])
        if why is not None:
            print(f"left out: {row['id']}: {why}")


def main(arguments: Sequence[str]) -> None:
    """Run the command."""
    if arguments[:1] == ["--docs"]:
        page = Path(arguments[1])
        rows = read_rows(ROWS)
        page.write_text(with_sections(page.read_text(), rows, predictions(rows)))
    else:
        show(Path(arguments[0]) if arguments else ROWS)


if __name__ == "__main__":
    main(sys.argv[1:])
