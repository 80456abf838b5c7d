"""`megatron-ds generate`: continue prompts by a model on several ranks."""

from __future__ import annotations

import json as json_
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_ds.cli.plugins import Imports, load_plugins
from megatron_ds.paths import expanded

if TYPE_CHECKING:
    from megatron_ds.generation import Completion, Prompt

HELP = """Continue prompts by a model on tensor and pipeline ranks.

MODEL is a Hugging Face directory, a checkpoint, or a run's output, of which the
latest checkpoint is used. The most probable token is chosen (greedy) unless
--temperature is above 0. A text ends at the model's end tokens, as
generation_config.json has them, at --stop, or after --max-new-tokens. The text
of a single prompt is shown as it is written.

Examples:

\b
  megatron-ds generate path/to/hf_dir --prompt "Once upon a time"
  megatron-ds generate out/run --prompt "What is 2 + 2?" --chat --tp 2
  megatron-ds generate path/to/hf_dir --prompts prompts.jsonl --json
  torchrun --nproc-per-node 2 -m megatron_ds generate hf_dir --prompt A --tp 2
"""


def generate(
    model: Annotated[
        Path, typer.Argument(help="A Hugging Face directory or a checkpoint.", metavar="MODEL", parser=expanded)
    ],
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", metavar="TEXT", help="A prompt; may be given several times.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts", metavar="FILE", parser=expanded, help="JSON lines with a `prompt`, or with `messages`."
        ),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Prompts are messages of a user, for the tokenizer's chat template.")
    ] = False,
    tp: Annotated[int, typer.Option("--tp", metavar="N", help="Tensor ranks.")] = 1,
    pp: Annotated[int, typer.Option("--pp", metavar="N", help="Pipeline ranks.")] = 1,
    dtype: Annotated[
        str, typer.Option("--dtype", metavar="TYPE", help="Of the weights: auto, float32, bfloat16 or float16.")
    ] = "auto",
    peft: Annotated[
        Path | None, typer.Option("--peft", metavar="DIR", parser=expanded, help="Adapters on top of the model.")
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option("--tokenizer", metavar="DIR", parser=expanded, help="The tokenizer (default: the model's)."),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", metavar="N", help="The most tokens that are added to a prompt.")
    ] = 128,
    temperature: Annotated[
        float, typer.Option("--temperature", metavar="T", help="0 = greedy; else the divisor of the logits.")
    ] = 0.0,
    top_k: Annotated[
        int | None, typer.Option("--top-k", metavar="K", help="Draw from the K most probable tokens.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option("--top-p", metavar="P", help="Draw from the fewest tokens that reach probability P.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of the draws.")] = 1234,
    stop: Annotated[
        list[str] | None,
        typer.Option("--stop", metavar="TEXT", help="End a text before this one; may be given several times."),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", metavar="N", help="The most prompts of a batch.")] = 8,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object for each prompt.")] = False,
    imports: Imports = None,
) -> None:
    """Run the command; see HELP."""
    load_plugins(imports)
    from megatron_ds.log import quiet_libraries

    quiet_libraries()  # before DeepSpeed says that it finds no GPU
    from megatron_ds.generation import Prompt, Sampling, read_prompts
    from megatron_ds.generation.run import Request, run
    from megatron_ds.parallel.rank_info import rank_from_environment

    given = [Prompt.of_user(text) if chat else Prompt(text) for text in prompt or []]
    if prompts is not None:
        given += [Prompt.of_user(one.text) if chat and one.messages is None else one for one in read_prompts(prompts)]
    request = Request(
        *(str(model), given, tp, pp, dtype),
        peft=str(peft) if peft is not None else None,
        tokenizer=str(tokenizer) if tokenizer is not None else None,
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature, top_k, top_p, seed),
        stop=tuple(stop or []),
        batch_size=batch_size,
    )
    shows_at_once = len(given) == 1 and not json
    found = run(request, on_text=_Shown(given[0]) if shows_at_once else None)
    info = rank_from_environment()
    if info is not None and info.rank > 0:
        return
    if shows_at_once:
        print("" if found.completions[0].text else _quoted(given[0]))
    for one in [] if shows_at_once else found.completions:
        print(_as_json(one) if json else f"{_quoted(one.prompt)}{one.text}\n")
    tokens = found.num_tokens
    rate = f"{tokens:,} tokens in {found.seconds:.2f} s, {tokens / found.seconds:,.1f} tokens/s"
    print(rate, file=sys.stderr)


class _Shown:
    """Shows a prompt, and the text after it as it is written."""

    def __init__(self, prompt: Prompt) -> None:
        self._prompt: Prompt | None = prompt

    def __call__(self, number: int, text: str) -> None:
        before, self._prompt = "" if self._prompt is None else _quoted(self._prompt), None
        print(f"{before}{text}", end="", flush=True)


def _quoted(prompt: Prompt) -> str:
    """Return what is shown of a prompt: a text is continued on its line, an answer has its own."""
    return prompt.text if prompt.messages is None else f"> {prompt.text}\n"


def _as_json(one: Completion) -> str:
    fields = asdict(one)
    shown = fields.pop("prompt")
    own = {"messages": shown["messages"]} if shown["messages"] is not None else {"prompt": shown["text"]}
    return json_.dumps({**own, **fields, "num_tokens": len(one.ids)}, ensure_ascii=False)
