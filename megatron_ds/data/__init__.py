"""Data: text, conversations or token ids on disk -> micro-batches of each rank, in an order that no layout changes."""

from megatron_ds.columns import IGNORE_INDEX
from megatron_ds.data.chat.options import ChatOptions
from megatron_ds.data.collate import NO_SAMPLE, collate, cut_rows
from megatron_ds.data.dataset import Dataset, Sample, blank_sample
from megatron_ds.data.formats import (
    FORMATS,
    DataFormat,
    check_format,
    check_labels,
    default_cache_dir,
    format_options,
    format_sources,
    open_dataset,
)
from megatron_ds.data.objective import Causal, DataObjective, Labelled, Masked, Seq2Seq
from megatron_ds.data.readers.tokenizer import load_tokenizer
from megatron_ds.data.request import DatasetRequest, Order, Split
from megatron_ds.data.sampler import GlobalBatches, for_data_rank, ordered_pass

__all__ = [
    "FORMATS",
    "IGNORE_INDEX",
    "NO_SAMPLE",
    "Causal",
    "ChatOptions",
    "DataFormat",
    "DataObjective",
    "Dataset",
    "DatasetRequest",
    "GlobalBatches",
    "Labelled",
    "Masked",
    "Order",
    "Sample",
    "Seq2Seq",
    "Split",
    "blank_sample",
    "check_format",
    "check_labels",
    "collate",
    "cut_rows",
    "default_cache_dir",
    "for_data_rank",
    "format_options",
    "format_sources",
    "load_tokenizer",
    "open_dataset",
    "ordered_pass",
]
