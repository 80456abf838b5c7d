"""Generation by ranks that are started for it."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_ds.data.readers.tokenizer import load_tokenizer
from megatron_ds.engine import device_count, device_type, preload, start_distributed, stop_distributed
from megatron_ds.errors import DataError, TopologyError
from megatron_ds.generation.generator import check_prompts
from megatron_ds.generation.loading import AUTO_DTYPE, check_model, open_generator
from megatron_ds.generation.prompts import Completion, OnText, Prompt, TextGenerator, encode_prompts
from megatron_ds.generation.sampling import GREEDY, Sampling
from megatron_ds.hf.end_tokens import known_end_ids
from megatron_ds.log import quiet_libraries
from megatron_ds.parallel.launch import run_local
from megatron_ds.parallel.rank_info import RankInfo, rank_from_environment, rank_source
from megatron_ds.runtime import LoadedModel, load_model


@dataclass(frozen=True)
class Request:
    """Everything that a generation depends on.

    Attributes:
        source: a Hugging Face directory, a checkpoint, or a run's output, of which the latest checkpoint is used.
        prompts: texts and conversations.
        tp, pp: tensor and pipeline ranks, started on this machine.
        dtype: of the weights; see `open_generator`.
        peft: a directory of adapters on top of the source; None = none.
        tokenizer: its directory; None = that of the source.
        max_new_tokens, sampling, stop, batch_size: see `TextGenerator.generate`.
    """

    source: str
    prompts: Sequence[Prompt]
    tp: int = 1
    pp: int = 1
    dtype: str = AUTO_DTYPE
    peft: str | None = None
    tokenizer: str | None = None
    max_new_tokens: int = 128
    sampling: Sampling = GREEDY
    stop: Sequence[str] = ()
    batch_size: int = 8


@dataclass(frozen=True)
class Generated:
    """The completions of a request, and the seconds from the first prompt to the last token, without loading."""

    completions: list[Completion]
    seconds: float

    @property
    def num_tokens(self) -> int:
        """Number of new tokens."""
        return sum(len(one.ids) for one in self.completions)


def generate(
    source: str | Path,
    prompts: Sequence[str | Sequence[Mapping[str, Any]]],
    *,
    tp: int = 1,
    pp: int = 1,
    dtype: str = AUTO_DTYPE,
    peft: str | Path | None = None,
    tokenizer: str | Path | None = None,
    chat: bool = False,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 1234,
    stop: Sequence[str] = (),
    batch_size: int = 8,
) -> list[Completion]:
    """Continue prompts by a model on tp * pp ranks of this machine.

    Args:
        source: a Hugging Face directory, a checkpoint, or a run's output, of which the latest checkpoint is used.
        prompts: texts; or conversations, each a sequence of messages with a role and a content.
        tp, pp: tensor and pipeline ranks.
        dtype: "float32", "bfloat16" or "float16"; "auto" = that of most weights on disk.
        peft: a directory of adapters on top of the source.
        tokenizer: its directory; None = that of the source.
        chat: each text is the message of a user, for the tokenizer's chat template.
        max_new_tokens: the most tokens that are added to a prompt.
        temperature: 0 = the most probable token (greedy); else the divisor of the logits.
        top_k, top_p: the tokens that are drawn from; see `Sampling`.
        seed: of the draws.
        stop: texts before which a completion ends.
        batch_size: the most prompts of a batch.

    Raises:
        MegatronDSError: the model cannot be read, divided or generate; a value or a prompt is invalid.
        LaunchError: a rank died; the message has its traceback.
    """
    as_prompt = Prompt.of_user if chat else Prompt
    read = [
        as_prompt(one) if isinstance(one, str) else Prompt.of_messages(one, f"prompt {number}")
        for number, one in enumerate(prompts, start=1)
    ]
    request = Request(
        *(str(source), read, tp, pp, dtype),
        peft=str(peft) if peft is not None else None,
        tokenizer=str(tokenizer) if tokenizer is not None else None,
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature, top_k, top_p, seed),
        stop=tuple(stop),
        batch_size=batch_size,
    )
    return run(request).completions


def run(request: Request, on_text: OnText | None = None) -> Generated:
    """Start the ranks of a request, and return what they generate.

    Args:
        request: the request.
        on_text: see `TextGenerator.generate`; called on rank 0, which is another process.

    Raises:
        MegatronDSError, LaunchError: see `generate`.
    """
    quiet_libraries()
    if rank_from_environment() is not None:
        settings = " and ".join(rank_source().settings)
        raise TopologyError(
            f"generate starts its own ranks, and {settings} in the environment make it a launcher's; run it without "
            f"torchrun, deepspeed or srun; {rank_source().start_alone()}"
        )
    request.sampling.check()
    if not request.prompts:
        raise DataError("there is no prompt; try --prompt TEXT, or --prompts FILE")
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking for GPUs must not forbid forking
    model = load_model(request.source, tokenizer=request.tokenizer, peft=request.peft)
    check_model(model, request.tp, request.pp, request.dtype)
    size, here = request.tp * request.pp, device_count()
    if device_type() != "cpu" and size > here:
        raise TopologyError(
            f"--tp * --pp = {size} is more than the {here} {device_type()} devices here; nearest: {here}"
        )
    preload()
    return run_local(lambda info: _run_rank(info, model, request, on_text if info.rank == 0 else None), size)[0]


def _run_rank(info: RankInfo, model: LoadedModel, request: Request, on_text: OnText | None) -> Generated:
    """Generate as one rank. Collective over the world."""
    torch.set_num_threads(max(1, torch.get_num_threads() // info.world_size))
    path = model.section.tokenizer or model.section.path
    assert path is not None
    tokenizer = load_tokenizer(path)
    check_prompts(model.hf.core, encode_prompts(tokenizer, request.prompts, path), request.max_new_tokens)
    device = start_distributed(info)
    generator = open_generator(model, info.rank, device, tp=request.tp, pp=request.pp, dtype=request.dtype)
    texts = TextGenerator(generator, tokenizer, path, known_end_ids(model.hf, model.section.path))
    began = time.perf_counter()
    completions = texts.generate(
        request.prompts,
        request.max_new_tokens,
        sampling=request.sampling,
        stop=request.stop,
        on_text=on_text,
        batch_size=request.batch_size,
    )
    seconds = time.perf_counter() - began
    stop_distributed()
    return Generated(completions, seconds)
