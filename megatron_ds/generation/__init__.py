"""Generation of text by a model that is divided over tensor and pipeline ranks, with a cache of keys and values.

`generate` starts its own ranks. In a program that has ranks, `open_generator` builds a `Generator` on each of them, and
`TextGenerator` puts a tokenizer around it. transformers' greedy search is the reference, token for token.
"""

from megatron_ds.generation.generator import Generator, Row, check_prompts
from megatron_ds.generation.loading import open_generator
from megatron_ds.generation.prompts import Completion, Prompt, TextGenerator, added_text, encode_prompts, read_prompts
from megatron_ds.generation.sampling import Sampling
from megatron_ds.generation.whole_rows import generate_by_rows

__all__ = [
    "Completion",
    "Generator",
    "Prompt",
    "Row",
    "Sampling",
    "TextGenerator",
    "added_text",
    "check_prompts",
    "encode_prompts",
    "generate_by_rows",
    "open_generator",
    "read_prompts",
]
