"""Generation by ranks that are started for it."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from megatron_ds.checkpoint.directory import resolve_checkpoint
from megatron_ds.data.readers.tokenizer import load_tokenizer
from megatron_ds.engine import device_count, device_type, preload, start_distributed, stop_distributed
from megatron_ds.errors import ConversionError, DataError, TopologyError
from megatron_ds.generation.generator import check_prompts
from megatron_ds.generation.loading import AUTO_DTYPE, check_model, open_generator
from megatron_ds.generation.prompts import Completion, OnText, Prompt, TextGenerator, encode_prompts
from megatron_ds.generation.sampling import GREEDY, Sampling
from megatron_ds.hf.end_tokens import known_end_ids
from megatron_ds.hf.peft.config import ADAPTER_CONFIG, named_base
from megatron_ds.log import quiet_libraries
from megatron_ds.parallel.agreement import Facts
from megatron_ds.parallel.consensus import run_on_all_ranks
from megatron_ds.parallel.launch import run_local
from megatron_ds.parallel.rank_info import RankInfo, rank_from_environment, rank_source
from megatron_ds.parallel.watchdog import PEER_TIMEOUT_S, watch_peers
from megatron_ds.runtime import LoadedModel, load_model, session
from megatron_ds.runtime.file_facts import flatten, model_facts


@dataclass(frozen=True)
class Request:
    """Everything that a generation depends on.

    Attributes:
        source: a Hugging Face directory, a checkpoint, or a run's output, of which the latest checkpoint is used.
        prompts: texts and conversations.
        tp, pp: tensor and pipeline ranks, started on this machine unless a launcher has started them.
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

    @property
    def num_ranks(self) -> int:
        return self.tp * self.pp


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
    """Continue prompts by a model on tp * pp ranks.

    Under torchrun, the `deepspeed` launcher or srun this process is one of these ranks; alone it starts them on this
    machine.

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
    """Start the ranks of a request, or be one of a launcher's, and return what they generate.

    Args:
        request: the request.
        on_text: see `TextGenerator.generate`; called on rank 0, which is another process unless a launcher started it.

    Raises:
        MegatronDSError, LaunchError: see `generate`.
    """
    quiet_libraries()
    request.sampling.check()
    if not request.prompts:
        raise DataError("there is no prompt; try --prompt TEXT, or --prompts FILE")
    info = rank_from_environment()
    if info is not None:
        return _run_launched(request, info, on_text)
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking for GPUs must not forbid forking
    model = _open(request)
    here = device_count()
    if device_type() != "cpu" and request.num_ranks > here:
        raise TopologyError(
            f"--tp * --pp = {request.num_ranks} is more than the {here} {device_type()} devices here; nearest: {here}"
        )
    preload()
    return run_local(lambda info: _run_local_rank(info, model, request, on_text), request.num_ranks)[0]


def _open(request: Request) -> LoadedModel:
    model = open_source(request.source, request.peft, request.tokenizer)
    check_model(model, request.tp, request.pp, request.dtype)
    return model


def _run_launched(request: Request, info: RankInfo, on_text: OnText | None) -> Generated:
    """Generate as one of a launcher's ranks."""
    if info.world_size != request.num_ranks:
        raise TopologyError(
            f"--tp * --pp = {request.num_ranks} is not the launcher's number of ranks, {info.world_size}; try --tp "
            f"{info.world_size}; {rank_source().start_alone()}"
        )
    with session(facts=lambda: _facts(request), peer_timeout_s=PEER_TIMEOUT_S) as ranks:
        model = run_on_all_ranks(lambda: _open(request))
        return _run(ranks.info, ranks.device, model, request, on_text)


def _facts(request: Request) -> Facts:
    """Return what must be the same on every rank of a launcher."""
    paths = {"the model": request.source, "--peft": request.peft, "--tokenizer": request.tokenizer}
    files = {name: value for field, path in paths.items() for name, value in model_facts(field, path).items()}
    return {"command": dict(flatten("", asdict(request))), "model": files}


def _run_local_rank(info: RankInfo, model: LoadedModel, request: Request, on_text: OnText | None) -> Generated:
    """Generate as one of the ranks that this machine has started."""
    torch.set_num_threads(max(1, torch.get_num_threads() // info.world_size))
    with watch_peers(info):
        found = _run(info, start_distributed(info), model, request, on_text)
        stop_distributed()
    return found


def open_source(source: str, peft: str | None = None, tokenizer: str | None = None) -> LoadedModel:
    """Open a model by its directory, its adapters on it, or the directory of its adapters alone.

    Args:
        source, peft, tokenizer: see `Request`. Adapters name the directory of their base model.

    Raises:
        ConversionError: see `load_model`; or adapters name no base model.
    """
    directory = resolve_checkpoint(source)
    if peft is None and (directory / ADAPTER_CONFIG).is_file() and not (directory / "config.json").is_file():
        base = named_base(directory)
        if not base:
            raise ConversionError(
                f"{source} holds adapters and names no base model; try the base model with --peft {source}"
            )
        return load_model(base, peft=str(directory), tokenizer=tokenizer)
    return load_model(source, peft=peft, tokenizer=tokenizer)


def _run(
    info: RankInfo, device: torch.device, model: LoadedModel, request: Request, on_text: OnText | None
) -> Generated:
    """Generate as one rank. Collective over the world."""
    path = model.section.tokenizer or model.section.path
    assert path is not None

    def read() -> PreTrainedTokenizerBase:
        tokenizer = load_tokenizer(path)
        check_prompts(model.hf.core, encode_prompts(tokenizer, request.prompts, path), request.max_new_tokens)
        return tokenizer

    tokenizer = run_on_all_ranks(read)
    generator = open_generator(model, info.rank, device, tp=request.tp, pp=request.pp, dtype=request.dtype)
    texts = TextGenerator(generator, tokenizer, path, known_end_ids(model.hf, model.section.path))
    began = time.perf_counter()
    completions = texts.generate(
        request.prompts,
        request.max_new_tokens,
        sampling=request.sampling,
        stop=request.stop,
        on_text=on_text if info.rank == 0 else None,
        batch_size=request.batch_size,
    )
    return Generated(completions, time.perf_counter() - began)
