"""The table of supported families: their classes, well-known models, and what the tests have proven of each.

`make tables` writes the proof, proof.json, from the cases of the tests, and the table into docs/families.md.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megatron_ds.hf.family import Family
from megatron_ds.hf.label_classes import label_classes
from megatron_ds.hf.registry import FAMILIES

BEGIN, END = "<!-- made by `make tables` -->", "<!-- end -->"
PROOF = Path(__file__).with_name("proof.json")

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
    "phi": "Phi-1, Phi-1.5, Phi-2",
    "stablelm": "StableLM 2 1.6B and 12B, StableLM 3B, Zephyr 3B",
    "gpt_bigcode": "StarCoder 1, SantaCoder",
    "gpt_neo": "GPT-Neo 125M to 2.7B",
    "codegen": "CodeGen mono, multi and nl",
    "biogpt": "BioGPT",
    "cohere": "Command R, Command R+, Aya 23",
    "cohere2": "Command R7B, Command A",
    "nemotron": "Minitron, Nemotron-4",
    "hunyuan_v1_dense": "Hunyuan 0.5B to 7B",
    "apertus": "Apertus 8B, 70B",
    "ministral3": "Ministral 3, text only",
    "gemma": "Gemma 1, 2B and 7B",
    "vaultgemma": "VaultGemma 1B",
    "olmo3": "OLMo 3, 7B and 32B",
    "exaone4": "EXAONE 4.0",
    "seed_oss": "Seed-OSS 36B",
    "ministral": "Ministral 8B",
    "cwm": "Code World Model 32B",
    "internlm3": "InternLM3 8B",
    "iquestcoder": "IQuest-Coder",
    "arcee": "AFM 4.5B",
    "jais2": "Jais 2",
    "ernie4_5": "ERNIE 4.5 0.3B",
    "helium": "Helium 1",
    "glm": "GLM-4 9B, GLM-Edge",
    "glm4": "GLM-4 0414, 9B and 32B",
    "hyperclovax": "HyperCLOVA X SEED Think",
    "granitemoehybrid": "Granite 4.0 without Mamba layers",
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
    "distilbert": "DistilBERT",
    "electra": "ELECTRA, generators",
    "albert": "ALBERT",
    "modernbert": "ModernBERT, GTE ModernBERT",
    "eurobert": "EuroBERT 210M to 2.1B",
    "nomic_bert": "Nomic Embed Text",
    "t5": "T5, T5 v1.1, Flan-T5",
    "mt5": "mT5",
    "gemma3": "Gemma 3 4B, 12B, 27B: the text",
    "qwen2_vl": "Qwen2-VL: the text",
    "qwen2_5_vl": "Qwen2.5-VL: the text",
    "qwen3_vl": "Qwen3-VL, dense: the text",
    "mistral3": "Mistral Small 3.1, 3.2: the text",
    "internvl": "InternVL 2.5 to 3.5 (-hf): the text",
    "llava": "LLaVA 1.5, Pixtral 12B (-hf): the text",
    "llava_next": "LLaVA 1.6: the text",
    "paligemma": "PaliGemma, PaliGemma 2: the text",
    "glm4v": "GLM-4.1V 9B: the text",
    "smolvlm": "SmolVLM, SmolVLM2: the text",
    "idefics3": "Idefics3 8B: the text",
}


@dataclass(frozen=True)
class Proof:
    """The comparisons of a family with transformers in the test suite and `make sweep`, all in fp32.

    Attributes:
        configs: number of configs whose outputs, loss and every gradient are equal.
        layouts: number of layouts (tensor, pipeline, sequence) at which they are equal.
        steps: number of training steps after which the losses are equal, at three layouts; 0 = not compared.
        real_weights: published models that are compared with their real weights; empty = all weights were random.
    """

    configs: int = 0
    layouts: int = 0
    steps: int = 0
    real_weights: tuple[str, ...] = ()


@dataclass(frozen=True)
class Support:
    """A line of the table.

    Attributes:
        model_type: as in config.json.
        architecture: the class of transformers, by default if a config names no other.
        known: well-known models; empty for families from outside.
        label_classes: the classes of transformers with a head for labels, of texts and of tokens.
        proof: what is proven; None for families from outside.
    """

    model_type: str
    architecture: str
    known: str
    label_classes: tuple[str, ...]
    proof: Proof | None

    @property
    def labels(self) -> str:
        """A text on the heads for labels, such as "texts, tokens"; empty = none."""
        kinds = {"ForSequenceClassification": "texts", "ForTokenClassification": "tokens"}
        return ", ".join(kinds[name[name.index("For") :]] for name in self.label_classes)

    @property
    def proven(self) -> str:
        """A text on what is proven, such as "5 configs, 11 layouts, 5 steps; random weights"."""
        if self.proof is None:
            return "nothing: the family is from outside"
        proof = self.proof
        steps = f", {proof.steps} steps" if proof.steps else ""
        weights = ", ".join(proof.real_weights)
        configs = f"{proof.configs} config{'s' if proof.configs != 1 else ''}"
        return f"{configs}, {proof.layouts} layouts{steps}; {weights or 'random weights'}"


def support() -> list[Support]:
    """Return the lines of the table, families from outside included, in the order of the registry."""
    proofs = {name: Proof(**fields) for name, fields in json.loads(PROOF.read_text(encoding="utf-8")).items()}
    proofs = {name: replace(proof, real_weights=tuple(proof.real_weights)) for name, proof in proofs.items()}
    return [_line(family, proofs.get(name)) for name, family in FAMILIES.items()]


def _line(family: Family, proof: Proof | None) -> Support:
    name = family.model_type
    classes, known = tuple(label_classes(family)), name in MODELS
    return Support(name, family.architecture, MODELS.get(name, ""), classes, proof if known else None)


def markdown(lines: Iterable[Support]) -> str:
    """Return the table in Markdown."""
    rows = [("`model_type`", "class in transformers", "such as", "labels", "proven"), ("---",) * 5]
    rows += [(f"`{one.model_type}`", f"`{one.architecture}`", one.known, one.labels, one.proven) for one in lines]
    return "\n".join(f"| {' | '.join(row)} |".replace("|  |", "| |") for row in rows)


def with_table(text: str) -> str:
    """Replace the text between the marks of a page by the table of this package's families."""
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    assert len(pattern.findall(text)) == 1, "the page needs the marks of the table once"
    table = markdown(line for line in support() if line.proof is not None)
    return pattern.sub(lambda _: f"{BEGIN}\n{table}\n{END}", text)


def proof_json(proofs: dict[str, Proof]) -> str:
    """Return the content of proof.json."""
    lines = [f"  {json.dumps(name)}: {json.dumps(asdict(proof))}" for name, proof in proofs.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(with_table(page.read_text(encoding="utf-8")), encoding="utf-8")
