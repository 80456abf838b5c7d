"""A tiny run with a checkpoint."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from megatron_ds.config import build_run
from megatron_ds.training.launch import train
from tests.ranks import preload
from tests.training.tiny import run_mapping


def train_tiny(corpus: Path, output: Path, **changes: Any) -> float:
    """Train a run of five steps, with a large learning rate, on the tiny corpus; return its last validation loss."""
    mapping = {**run_mapping(corpus, output), "checkpoint": {"every": 5}, **changes}
    mapping["optimizer"] = {"lr": 0.05}
    preload()
    loss = train(build_run(mapping)).last_valid_loss
    assert loss is not None
    return loss


@pytest.fixture(scope="session")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The output of a run, and its last validation loss."""
    output = tmp_path_factory.mktemp("evaluate") / "run"
    return output, train_tiny(corpus, output)


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of bytes and a few pairs of them."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer, backend.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    backend.train_from_iterator(
        ["und eine Übung"], BpeTrainer(vocab_size=265, special_tokens=["<eos>"], initial_alphabet=ByteLevel.alphabet())
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
