"""Directories of old and new versions of peft: what is merged equals peft's merge, whatever the file's form."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_ds.checkpoint.convert import export_hf
from megatron_ds.errors import ConversionError
from megatron_ds.hf.config import read_model
from megatron_ds.hf.family import EMBEDDING
from megatron_ds.hf.peft.adapters import PREFIX, read_adapters
from megatron_ds.hf.peft.config import ADAPTER_WEIGHTS
from megatron_ds.hf.peft.initial import InitialValues
from megatron_ds.hf.peft.reader import AdapterReader
from megatron_ds.hf.weights import HFWeights
from megatron_ds.layers.param_spec import ParamSpec, over_tensor
from megatron_ds.log import LOGGER_NAME, get_logger
from megatron_ds.runtime import load_model
from tests.parallel.axes import axes_at
from tests.parity.reference import ALL_CONFIGS, make_model
from tests.ranks import run_alone

TABLES = ["embed_tokens", "lm_head"]
# base -> fields of peft's config
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "both-tables": ("llama", {"modules_to_save": TABLES}),
    "norms": ("llama", {"modules_to_save": ["norm"]}),
    "both-untie": ("tied", {"modules_to_save": TABLES}),
    "embedding-unties": ("tied", {"modules_to_save": ["embed_tokens"]}),
    "head-unties": ("tied", {"modules_to_save": ["lm_head"]}),
    "kept-tied": ("tied", {"modules_to_save": ["lm_head"], "ensure_weight_tying": True}),
    "head-adapted": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "head-adapted-tied": ("tied", {"target_modules": ["q_proj", "lm_head"]}),
    "embedding-adapted-tied": ("tied", {"target_modules": ["q_proj", "embed_tokens"]}),
    "both-adapted-tied": ("tied", {"target_modules": ["q_proj", *TABLES], "use_rslora": True}),
    "one-of-each-tied": ("tied", {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["embed_tokens"]}),
    "dora": ("llama", {"target_modules": "all-linear", "use_dora": True}),
    "dora-on-tables": ("llama", {"target_modules": ["q_proj", "lm_head", "embed_tokens"], "use_dora": True}),
    "dora-inputs-first": ("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "use_dora": True}),
    "pissa": ("llama", {"target_modules": "all-linear", "init_lora_weights": "pissa", "use_rslora": True}),
    "pissa-on-tables": ("tied", {"target_modules": ["q_proj", *TABLES], "init_lora_weights": "pissa"}),
    "pissa-inputs-first": ("gpt2", {"target_modules": ["c_attn"], "init_lora_weights": "pissa", "use_dora": True}),
    "olora": ("llama", {"target_modules": ["v_proj", "o_proj"], "init_lora_weights": "olora"}),
    "token-rows": ("llama", {"trainable_token_indices": [7, 3]}),
    "token-rows-of-both": ("llama", {"trainable_token_indices": {"embed_tokens": [7, 3], "lm_head": [5]}}),
    "token-rows-tied": ("tied", {"trainable_token_indices": [7, 3]}),
    "regex": ("llama", {"target_modules": r".*layers\.1\..*(q_proj|down_proj)"}),
    "orthogonal": ("llama", {"init_lora_weights": "orthogonal", "r": 2}),
    "inputs-first": ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["wte", "c_fc"]}),
}


def _bases(directory: Path) -> None:
    make_model(ALL_CONFIGS["llama"]).save_pretrained(directory / "llama")
    make_model({**ALL_CONFIGS["llama"], "tie_word_embeddings": True}).save_pretrained(directory / "tied")
    make_model(ALL_CONFIGS["gpt2"]).save_pretrained(directory / "gpt2")


def _adapt(case: str, directory: Path) -> None:
    """Save an adapter with random values in all its parameters, and what peft merges of the saved files."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    base, given = CASES[case]
    fields = {"target_modules": ["q_proj", "v_proj"], "r": 3, "lora_alpha": 5, "task_type": "CAUSAL_LM", **given}

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(directory / base)

    model = get_peft_model(load(), LoraConfig(**fields))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(directory / case)
    merged = PeftModel.from_pretrained(load(), str(directory / case)).merge_and_unload()
    torch.save((merged.state_dict(), merged.config.tie_word_embeddings), directory / case / "merged.pt")


STARTS: dict[str, tuple[str, dict[str, Any]]] = {
    "dora": ("llama", {"target_modules": "all-linear", "use_dora": True}),
    "pissa": ("llama", {"target_modules": "all-linear", "init_lora_weights": "pissa", "use_dora": True}),
    "pissa-fused": ("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "init_lora_weights": "pissa"}),
    "olora": ("llama", {"target_modules": ["v_proj", "o_proj"], "init_lora_weights": "olora", "use_rslora": True}),
}


def _start(case: str, directory: Path) -> None:
    """Save peft's initial adapter, and the base weights that it leaves."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base, fields = STARTS[case]
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(directory / base), LoraConfig(r=4, **fields))
    model.save_pretrained(directory / f"start-{case}")
    left = {
        name.replace(".base_layer", ""): tensor for name, tensor in model.state_dict().items() if "lora" not in name
    }
    torch.save(left, directory / f"start-{case}" / "base.pt")


def _make(directory: Path) -> None:
    _bases(directory)
    for case in STARTS:
        _start(case, directory)
    for case in CASES:
        _adapt(case, directory)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases, and an adapter for each case."""
    directory = tmp_path_factory.mktemp("peft")
    run_alone(_make, directory)
    return directory


def _check_merged(adapter: Path, base: Path, merged: Path, target: Path) -> None:
    state, tied = torch.load(merged)
    export_hf(adapter, target, merge=True, base=base)
    ours = load_file(target / "model.safetensors")
    assert json.loads((target / "config.json").read_text())["tie_word_embeddings"] == tied
    assert ours.keys() == state.keys() - ({"lm_head.weight"} if tied else set())
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, state[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_merged_as_peft_merges_tables_and_modules(case: str, made: Path, tmp_path: Path) -> None:
    base = CASES[case][0]
    _check_merged(made / case, made / base, made / case / "merged.pt", tmp_path / "hf")
    plain, ours = load_file(made / base / "model.safetensors"), load_file(tmp_path / "hf" / "model.safetensors")
    assert any(not torch.equal(ours[name], plain[name]) for name in plain)


@pytest.mark.parametrize("case", STARTS)
def test_adapters_begin_as_in_peft(case: str, made: Path) -> None:
    """Magnitudes, A and B that follow from the base, and what remains of the base, bit for bit but for their sums."""
    base, fields = STARTS[case]
    weights = HFWeights(made / base, read_model(made / base))
    adapters = read_adapters({"r": 4, **fields}, weights.model, "base")
    theirs = AdapterReader(made / f"start-{case}", adapters)
    initial, left = InitialValues(adapters, weights, seed=5), torch.load(made / f"start-{case}" / "base.pt")
    letters = "ab" * ("init_lora_weights" in fields) + "m" * ("use_dora" in fields)
    compared = [name for name in adapters.table if name.rpartition(".")[2][0] in letters and initial.has(name)]
    assert len(compared) >= len(letters) * len(adapters.modules)
    for name in compared:
        torch.testing.assert_close(initial.full(name), theirs.full(name), rtol=1e-5, atol=1e-6)
    changed = [name for name in weights.model.table if initial.has(name)]
    assert bool(changed) == ("init_lora_weights" in fields)
    for name in changed:
        row = weights.model.table[name]
        wanted = row.op.read(lambda source, row=row: left[PREFIX + row.names[source]], adapters.axis_sizes)
        torch.testing.assert_close(initial.full(name), wanted, rtol=1e-5, atol=1e-6)


def _adapter_name(name: str) -> str:
    return name.replace("lora_A.", "lora_A.mine.").replace("lora_B.", "lora_B.mine.")


def test_a_base_in_half_precision_keeps_its_dtype(made: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(made / "llama", base)
    plain = {name: tensor.bfloat16() for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(plain, base / "model.safetensors", metadata={"format": "pt"})
    export_hf(made / "both-tables", tmp_path / "hf", merge=True, base=base)
    ours, saved = load_file(tmp_path / "hf" / "model.safetensors"), load_file(made / "both-tables" / ADAPTER_WEIGHTS)
    assert {tensor.dtype for tensor in ours.values()} == {torch.bfloat16}
    assert torch.equal(ours["lm_head.weight"], saved["base_model.model.lm_head.weight"].bfloat16())


FORMS: dict[str, Callable[[str], str]] = {
    "data-parallel": lambda name: f"module.{name}",
    "compiled": lambda name: name.replace("base_model.model.", "base_model.model._orig_mod.", 1),
    "adapter-name": _adapter_name,
    "wrapped": lambda name: name.replace("lm_head.", "lm_head.modules_to_save.default."),
    "wrapped-without-name": lambda name: name.replace("lm_head.", "lm_head.modules_to_save."),
    "without-prefix": lambda name: name.removeprefix("base_model.model."),
    "base-model": lambda name: name.replace("base_model.model.model.", "base_model.model."),
    "larger-model": lambda name: name.replace("base_model.model.model.", "base_model.model.model.language_model."),
}


@pytest.mark.parametrize("form", FORMS)
def test_names_of_the_same_tensors(form: str, made: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(made / "both-tables", adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({FORMS[form](name): tensor for name, tensor in tensors.items()}, adapter / "adapter_model.bin")
    assert not all(FORMS[form](name) == name for name in tensors)
    _check_merged(adapter, made / "llama", made / "both-tables" / "merged.pt", tmp_path / "hf")


def _changed(made: Path, adapter: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> Path:
    shutil.copytree(made / "both-tables", adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    change(tensors, config)
    save_file(tensors, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return adapter


def test_tables_of_a_resized_vocabulary_replace_those_of_the_base(made: Path, tmp_path: Path) -> None:
    """peft saves embedding and head when the vocabulary was resized, without `modules_to_save`."""
    more = 7

    def resize(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        config["modules_to_save"] = None
        for name in [name for name in tensors if "lora_" not in name]:
            rows = torch.randn(more, tensors[name].shape[1])
            tensors[name] = torch.cat([tensors[name], rows])

    adapter = _changed(made, tmp_path / "adapter", resize)
    model = export_hf(adapter, tmp_path / "hf", merge=True, base=made / "llama")
    ours, theirs = (
        load_file(file) for file in (tmp_path / "hf" / "model.safetensors", adapter / "adapter_model.safetensors")
    )
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(ours[name], theirs[f"base_model.model.{name}"])
    assert model.core.vocab_size == read_model(tmp_path / "hf").core.vocab_size == len(ours["lm_head.weight"])
    assert model.core.vocab_size == ALL_CONFIGS["llama"]["vocab_size"] + more
    loaded, embedding = load_model(made / "llama", peft=str(adapter)), ours["model.embed_tokens.weight"]
    spec = ParamSpec(tuple(embedding.shape), over_tensor(0))
    assert loaded.hf.core.vocab_size == len(embedding) and EMBEDDING in loaded.frozen and loaded.read_shard is not None
    assert torch.equal(loaded.read_shard(EMBEDDING, spec, axes_at(tensor=(0, 1))), embedding)


def test_two_adapters_in_one_file_are_refused(made: Path, tmp_path: Path) -> None:
    def double(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        tensors.update({_adapter_name(name): one.clone() for name, one in tensors.items() if "lora_" in name})

    adapter = _changed(made, tmp_path / "adapter", double)
    with pytest.raises(ConversionError, match=r"are one tensor; keep those of one adapter$"):
        export_hf(adapter, tmp_path / "hf", merge=True, base=made / "llama")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"enable_lora": None, "merge_weights": False}, None),
        ({"merge_weights": True, "runtime_config": {}}, None),
        ({"a_field_of_tomorrow": [], "another": 0, "a_third": ""}, None),
        ({"alpha_pattern": None, "rank_pattern": None, "lora_dropout": None, "bias": None, "peft_type": None}, None),
        ({"layer_replication": [], "lora_bias": None, "loftq_config": None}, None),
        ({"eva_config": {"rho": 3.0}, "init_lora_weights": "eva"}, None),
        ({"enable_lora": [True, False, True]}, r"\.enable_lora=\[True, False, True\] is not a field of"),
        ({"a_field_of_tomorrow": 1}, r"\.a_field_of_tomorrow=1 is not a field of peft's LoraConfig"),
        ({"lora_bias": True}, r"\.lora_bias=True is not supported; nearest: False"),
        ({"bias": "all"}, r"\.bias=all is not supported; nearest: none"),
        ({"init_lora_weights": "loftq"}, r"\.init_lora_weights=loftq is not supported; supported: true, false, "),
        ({"init_lora_weights": "pissa_niter_4"}, r"\.init_lora_weights=pissa_niter_4 is not .*; nearest: pissa$"),
        ({"init_lora_weights": "orthogonal"}, r"\.r=3 must be even for an orthogonal start; nearest: 4"),
        ({"modules_to_save": ["embed"]}, r"\.modules_to_save=embed matches nothing in a llama; supported: down_proj,"),
        ({"modules_to_save": ["k_proj"]}, r"\.modules_to_save leaves out .*v_proj.weight, which is one"),
        ({"modules_to_save": ["self_attn"]}, r"target_modules=\['q_proj', 'v_proj'\] matches nothing"),
    ],
    ids=str,
)  # fmt: skip
def test_fields_of_other_versions(
    fields: dict[str, Any],
    says: str | None,
    made: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    adapter = _changed(made, tmp_path / "adapter", lambda tensors, config: config.update(fields))
    caplog.set_level("INFO", LOGGER_NAME)
    monkeypatch.setattr(get_logger(), "propagate", True)  # a test before may have set up the log of a command
    if says is None:
        config = read_adapters(adapter, read_model(made / "llama"), "base").config
        unknown = fields.keys() & {"enable_lora", "merge_weights", "a_field_of_tomorrow"}
        assert not unknown & config.keys() and all(name in caplog.text for name in unknown)
        return
    with pytest.raises(ConversionError, match=says):
        read_adapters(adapter, read_model(made / "llama"), "base")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"use_dorra": False}, "peft.use_dorra is not a field of peft's LoraConfig; did you mean use_dora?"),
        ({"lora_r": 8}, "peft.lora_r is not a field of peft's LoraConfig; did you mean r?"),
        ({"lora_r": "x"}, "peft.lora_r is not a field of peft's LoraConfig; remove it"),
        ({"dropout": 0.1}, "peft.dropout is not a field of peft's LoraConfig; did you mean lora_dropout?"),
        ({"quant": 4}, "peft.quant is not a field of peft's LoraConfig; remove it"),
        ({"r": "8"}, "peft.r=8 is text, not an integer; remove the quotes"),
        ({"r": 8.0}, "peft.r=8.0 is not an integer"),
        ({"r": True}, "peft.r=true is not an integer"),
        ({"lora_dropout": "0.1"}, "peft.lora_dropout=0.1 is text, not a number; remove the quotes"),
        ({"lora_alpha": "big"}, "peft.lora_alpha=big is text, not a number"),
        ({"use_rslora": "true"}, "peft.use_rslora=true is text, not true or false; remove the quotes"),
        ({"target_modules": 5}, "peft.target_modules=5 is not a list of names"),
        ({"modules_to_save": 3}, "peft.modules_to_save=3 is not a list of names"),
        ({"rank_pattern": 3}, "peft.rank_pattern=3 is not a mapping from names to numbers"),
        ({"alpha_pattern": {"q_proj": "16"}}, "peft.alpha_pattern.q_proj=16 is text, not a number; remove the quotes"),
    ],
    ids=str,
)
def test_a_field_in_the_run_file_must_exist_and_have_its_kind(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ConversionError) as refused:
        read_adapters(fields, read_model(ALL_CONFIGS["llama"]), "base")
    assert str(refused.value) == says


def test_rows_of_tokens_are_merged_but_not_trained(made: Path) -> None:
    adapters = read_adapters(made / "token-rows", read_model(made / "llama"), "base")
    with pytest.raises(ConversionError, match=r"in export --merge only; try peft\.modules_to_save=\[embed_tokens\]"):
        adapters.check_trainable()


class Call:
    def __reduce__(self) -> Any:
        return print, ("code of a file was run",)


def test_a_bin_with_code_and_a_base_that_moved_are_refused(made: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(made / "both-tables", adapter)
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({"lora": Call()}, adapter / "adapter_model.bin")
    with pytest.raises(ConversionError, match=r"holds more than plain tensors, which is not loaded"):
        export_hf(adapter, tmp_path / "hf", merge=True, base=made / "llama")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "meta/hub-id"}))
    with pytest.raises(ConversionError, match=r"its base meta/hub-id does not exist here, HF_HUB_OFFLINE=1 forbids"):
        export_hf(adapter, tmp_path / "hf", merge=True)
