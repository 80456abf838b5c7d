"""The README's table of supported families, generated from the registry.

`python -m megatron_ds.hf.support_table README.md` updates it.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from megatron_ds.hf.registry import FAMILIES

BEGIN, END = "<!-- made by `make tables` -->", "<!-- end -->"

# Well-known models of each family.
MODELS = {
    "gpt2": "GPT-2, DistilGPT-2, GPT-SW3",
    "gpt_neox": "Pythia, GPT-NeoX-20B",
    "gptj": "GPT-J-6B",
    "opt": "OPT, 350M too; Galactica",
    "bloom": "BLOOM, BLOOMZ",
    "falcon": "Falcon RW, 7B, 40B, 180B",
    "llama": "Llama 1 to 3.3, SmolLM2, TinyLlama",
    "mistral": "Mistral 7B, Nemo, Small",
    "qwen2": "Qwen2, Qwen2.5",
    "qwen3": "Qwen3, dense",
    "phi3": "Phi-3 mini and medium, Phi-3.5 mini, Phi-4",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3, text only",
    "olmo2": "OLMo 2",
    "granite": "Granite 3, dense",
    "smollm3": "SmolLM3",
    "starcoder2": "StarCoder2",
    "mixtral": "Mixtral 8x7B, 8x22B",
    "qwen2_moe": "Qwen1.5-MoE, Qwen2-57B-A14B",
    "qwen3_moe": "Qwen3-30B-A3B, 235B-A22B, Coder",
    "olmoe": "OLMoE-1B-7B",
    "granitemoe": "Granite 3 1B-A400M, 3B-A800M",
    "granitemoeshared": "Granite MoE with shared experts",
    "ernie4_5_moe": "ERNIE 4.5 21B-A3B, 300B-A47B",
    "glm4_moe": "GLM-4.5, 4.5-Air, 4.6",
    "dots1": "dots.llm1",
    "minimax_m2": "MiniMax-M2, M2.5",
    "gpt_oss": "GPT-OSS 20B, 120B",
    "bert": "BERT, MiniLM and other encoders of its kind",
    "roberta": "RoBERTa, DistilRoBERTa",
    "xlm-roberta": "XLM-RoBERTa, multilingual E5",
    "camembert": "CamemBERT",
    "t5": "T5, T5 v1.1, Flan-T5",
    "mt5": "mT5",
}


def support_table() -> str:
    """Return the table in Markdown, one line per family of this package."""
    lines = ["| `model_type` | class in transformers | such as |", "| --- | --- | --- |"]
    lines += [f"| `{name}` | `{FAMILIES[name].architecture}` | {known} |" for name, known in MODELS.items()]
    return "\n".join(lines)


def with_table(text: str) -> str:
    """Replace the text between the marks of a page by the table."""
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    assert len(pattern.findall(text)) == 1, "the page needs the marks of the table once"
    return pattern.sub(lambda _: f"{BEGIN}\n{support_table()}\n{END}", text)


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(with_table(page.read_text(encoding="utf-8")), encoding="utf-8")
