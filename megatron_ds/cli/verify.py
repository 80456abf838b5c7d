"""`megatron-ds verify`: compare a Hugging Face directory, run on our ranks, with transformers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from megatron_ds.cli.json_file import check_json_file
from megatron_ds.cli.plugins import Imports, load_plugins
from megatron_ds.paths import expanded

if TYPE_CHECKING:
    from megatron_ds.config import ContextMethod
    from megatron_ds.verify import Report
    from megatron_ds.verify.compare import Difference
    from megatron_ds.verify.report import InputReport

HELP = """Run a Hugging Face directory on our ranks and in transformers, in fp32, and compare.

It compares the outputs, the loss and every gradient on random ids; the same without gradients on inputs longer than
the model's windows; and the bytes of every tensor after a round trip through our tables. If a difference exceeds its
bound, transformers runs a few times more, which shows whether rounding explains it. The exit status is 1 if anything
differs by more.

Examples:

\b
  megatron-ds verify path/to/hf_dir
  megatron-ds verify path/to/hf_dir --tp 2 --pp 2 --json report.json
  megatron-ds verify path/to/hf_dir --cp 4 --cp-method ring
  megatron-ds verify path/to/mixture_of_experts --tp 2 --ep 4
"""


VERDICTS = {
    "ok": "equal to transformers",
    "unclear": "undecidable in fp32, where rounding alone takes transformers as far from itself",
    "off": "NOT equal to transformers",
}


def verify(
    hf_dir: Annotated[
        Path, typer.Argument(help="config.json and weights; or an id on the hub.", metavar="HF_DIR", parser=expanded)
    ],
    tp: Annotated[int, typer.Option("--tp", metavar="N", help="Tensor ranks.")] = 1,
    pp: Annotated[int, typer.Option("--pp", metavar="N", help="Pipeline ranks.")] = 1,
    cp: Annotated[int, typer.Option("--cp", metavar="N", help="Context ranks, which divide each sequence.")] = 1,
    cp_method: Annotated[
        str, typer.Option("--cp-method", metavar="METHOD", help="Theirs: auto, ulysses, gather or ring.")
    ] = "auto",
    ep: Annotated[
        int | None, typer.Option("--ep", metavar="N", help="Ranks that divide the experts (default: the tensor ranks).")
    ] = None,
    sequence: Annotated[bool, typer.Option("--sequence", help="Sequence parallelism over the tensor ranks.")] = False,
    json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", parser=expanded, help="Write all numbers to this file.")
    ] = None,
    imports: Imports = None,
) -> None:
    """Run the command; see HELP."""
    load_plugins(imports)
    from megatron_ds.verify import verify_hf

    check_json_file(json, read=hf_dir)
    report = verify_hf(
        hf_dir, tp, pp, cp=cp, cp_method=cast("ContextMethod", cp_method), ep=ep, sequence=sequence, note=_note
    )
    if json is not None:
        report.save(json)
    for line in lines(report):
        print(line)
    if not report.ok:
        raise typer.Exit(1)


def _note(text: str) -> None:
    print(text, flush=True)


def lines(report: Report) -> list[str]:
    """Return the report as lines of text, one per result, the verdict last."""
    from megatron_ds.cli.display import format_count

    context = f" x cp {report.cp}" if report.cp > 1 else ""
    ranks = f"{report.tp * report.cp * report.pp * report.dp} = tp {report.tp}{context} x pp {report.pp}"
    ranks += f" x dp {report.dp}" if report.dp > 1 else ""
    ranks += f", ep {report.ep}" if report.ep is not None else ""
    ranks += ", sequence parallel" if report.sequence else ""
    found = [
        f"{'model':<12}{report.model_type}, {format_count(report.num_params)} parameters ({report.num_params:,}), fp32",
        f"{'world':<12}{ranks}",
    ]
    for one in report.inputs:
        found += _input_lines(one)
    found += _round_trip_lines(report)
    if report.not_reached is not None:
        found.append(f"{'not reached':<12}{report.not_reached}")
    return [*found, f"{'verdict':<12}{VERDICTS[report.verdict]}: {report.path}"]


def _input_lines(one: InputReport) -> list[str]:
    from megatron_ds.verify.compare import GRADIENT_BOUND, LOGITS_BOUND, LOSS_BOUND

    names = {name: name.replace("_", " ") for name in one.outputs}
    width = max(map(len, [*names.values(), "gradients"]))
    decoder = f", {one.decoder_length} in the decoder" if one.decoder_length is not None else ""
    found = [
        f"{'input':<12}{one.name}, {one.batch} x {one.length} tokens{decoder}",
    ]
    for name, label in names.items():
        found += _lines(f"{label:<{width}}", one.outputs[name], LOGITS_BOUND)
    found += _lines(f"{'loss':<{width}}", one.loss, LOSS_BOUND)
    if one.worst_gradient is not None:
        name, worst = one.worst_gradient
        found += _lines(f"{'gradients':<{width}}", worst, GRADIENT_BOUND, f"{len(one.gradients)} tensors, worst {name}")
        if len(one.wrong_gradients) > 1:
            found.append(f"{'':<12}{len(one.wrong_gradients)} gradients differ")
    return [*found, *_first_difference(one), *_other_choice(one)]


def _other_choice(one: InputReport) -> list[str]:
    name = one.first_other_choice
    if name is None:
        return []
    others, tokens = one.other_experts[name]
    own = one.own_other_experts.get(name)
    rounding = f"; in transformers itself up to {own} do after a rounding of its weights" if own is not None else ""
    found = f"{others} of {tokens} tokens chose others, first in {name}: more than rounding follows{rounding}"
    return [f"{'experts':<12}{found}"]


def _first_difference(one: InputReport) -> list[str]:
    from megatron_ds.verify.layer_names import stack_of_entry

    if one.first_difference is None:
        return [f"{'differs':<12}first after the last block"] if one.wrong_outputs else []
    stack = stack_of_entry(one.first_difference)
    where = (
        f"in {one.first_difference}"
        if stack is None
        else f"before the first block{f' of the {stack}' if stack else ''}"
    )
    return [f"{'differs':<12}first {where}, relative {one.hidden[one.first_difference].relative:.1e}"]


def _lines(name: str, difference: Difference, bound: float, more: str = "") -> list[str]:
    mark = {"ok": "ok ", "unclear": "???", "off": "OFF"}[difference.judge(bound)]
    numbers = f"relative {difference.relative:.1e} (bound {bound:.0e}), largest {difference.largest:.1e}"
    found = [f"  {name} {mark} {numbers}{f'; {more}' if more else ''}"]
    if difference.rounding is not None and not difference.within(bound):
        moved = f"transformers itself moves by {difference.rounding:.1e} if its weights are rounded differently"
        found.append(f"{'':<12}{moved}")
    return found


def _round_trip_lines(report: Report) -> list[str]:
    trip = report.round_trip
    left_out = f"; not compared: {', '.join(trip.left_out)}" if trip.left_out else ""
    if not trip.changed:
        return [f"{'round trip':<12}{len(trip.sha256)} tensors, bit for bit{left_out}"]
    return [f"{'round trip':<12}OFF {len(trip.changed)} of {len(trip.sha256)} tensors changed: {trip.changed[0]}"]
