"""Draw the loss at each position of long texts: of a model before and after it was extended, computed by transformers.

python examples/long_context/loss_by_position.py BEFORE AFTER [PNG [WINDOWS]]

The texts are 22 windows of 2,048 tokens, or WINDOWS, which begin at every 256th token of the validation text, so that
all positions see nearly the same tokens. A third curve is of the first model with the second one's rotation of
positions: stretched, but not trained.
"""

import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the directories are complete

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from megatron_ds.monitor.plot import BAD_COLOR, TRAIN_COLOR, VALID_COLOR, new_figure, save_figure, style_axes

TEXT = Path(__file__).parents[1] / "pretrain_moby_dick" / "data" / "valid.txt"
LENGTH, STRIDE, WINDOWS = 2048, 256, 22
BIN = 256
"""Positions whose losses are averaged to a point of the curve."""


def windows(directory: str) -> Tensor:
    """Return the windows of the text and the token after each, (windows, LENGTH + 1)."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = tokenizer(TEXT.read_text(encoding="utf-8"), return_tensors="pt", verbose=False).input_ids[0]
    return ids.unfold(0, LENGTH + 1, STRIDE)


def losses(model: Any, rows: Tensor) -> Tensor:
    """Return the mean loss of the positions of each bin, in nats per token, (LENGTH / BIN,)."""
    total = torch.zeros(LENGTH)
    with torch.inference_mode():
        for row in rows:
            logits = model(row[None, :-1], use_cache=False).logits[0]
            total += F.cross_entropy(logits, row[1:], reduction="none")
    return (total / len(rows)).view(-1, BIN).mean(dim=1)


def draw(curves: dict[str, Tensor], trained: int, png: str) -> None:
    """Draw a curve for each model, and a line at the length that the first one was trained on."""
    figure = new_figure()
    axes = figure.subplots()
    for (label, curve), color in zip(curves.items(), (BAD_COLOR, VALID_COLOR, TRAIN_COLOR)):
        middles = torch.arange(len(curve)) * BIN + BIN // 2
        axes.plot(middles, curve, color=color, linewidth=1.8, marker="o", markersize=3.5, label=label)
    axes.axvline(trained, color="#9aa1ab", linewidth=0.8, linestyle="--", label=f"trained on {trained} tokens")
    axes.set_title("loss by position", loc="left", fontsize=11, fontweight="bold")
    axes.set_xticks(range(0, LENGTH + 1, BIN), [f"{position:,}" for position in range(0, LENGTH + 1, BIN)])
    axes.set_xlabel("position in the text, tokens")
    axes.set_ylabel("loss (nats per token)")
    style_axes(axes)
    axes.legend(frameon=False, fontsize=9)
    save_figure(figure, png)


def main() -> None:
    """Print the losses and draw them."""
    before, after, *rest = sys.argv[1:]
    png = rest[0] if rest else "out/long_context/loss_by_position.png"
    disable_progress_bar()
    rows = windows(before)[: int(rest[1]) if rest[1:] else WINDOWS]
    extended = AutoModelForCausalLM.from_pretrained(after)
    rope = {name: getattr(extended.config, name) for name in ("rope_parameters", "max_position_embeddings")}
    models = {
        "before": AutoModelForCausalLM.from_pretrained(before),
        "stretched, not trained": AutoModelForCausalLM.from_pretrained(before, **rope),
        "after": extended,
    }
    curves = {label: losses(model.eval(), rows) for label, model in models.items()}
    print(f"{'positions up to':24}" + "".join(f"{last:8,}" for last in range(BIN, LENGTH + 1, BIN)))
    for label, curve in curves.items():
        print(f"{label:24}" + "".join(f"{loss:8.3f}" for loss in curve))
    draw(curves, extended.config.rope_parameters["original_max_position_embeddings"], png)
    print(f"drawn: {png}")


if __name__ == "__main__":
    main()
