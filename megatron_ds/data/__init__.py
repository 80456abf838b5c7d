"""Data: from text or token ids on disk to the micro-batches of each rank, in an order no layout can change."""

from megatron_ds.data.collate import NO_SAMPLE, collate
from megatron_ds.data.dataset import IGNORE_INDEX, Dataset, Sample
from megatron_ds.data.objective import Causal, Masked, Objective, Seq2Seq
from megatron_ds.data.open import FORMATS, open_dataset
from megatron_ds.data.options import ChatOptions, Order, Split
from megatron_ds.data.readers.tokenizer import load_tokenizer
from megatron_ds.data.sampler import GlobalBatches, for_data_rank, ordered_pass
from megatron_ds.data.text.token_cache import default_cache_dir

__all__ = [
    "FORMATS",
    "IGNORE_INDEX",
    "NO_SAMPLE",
    "Causal",
    "ChatOptions",
    "Dataset",
    "GlobalBatches",
    "Masked",
    "Objective",
    "Order",
    "Sample",
    "Seq2Seq",
    "Split",
    "collate",
    "default_cache_dir",
    "for_data_rank",
    "load_tokenizer",
    "open_dataset",
    "ordered_pass",
]
