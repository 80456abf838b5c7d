"""Tiny random models of every family and option, saved by transformers; and what is on disk, by hash."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from megatron_ds.hf.config import read_model
from megatron_ds.hf.export import exporting
from megatron_ds.hf.weight_files import open_directory
from megatron_ds.hf.weights import HFWeights
from megatron_ds.layers.param_spec import ParamSpec
from megatron_ds.models.sequential import SequentialModel
from tests.parallel.axes import axes_at
from tests.parity.cases import CONFIGS
from tests.parity.encoder_cases import ENCODER_CASES
from tests.parity.reference import make_model

Tensors = dict[str, torch.Tensor]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SMALL = {key: value for key, value in CONFIGS["llama"].items() if key != "rope_parameters"}


def build(config: dict[str, Any], dtype: str = "float32") -> Any:
    """A transformers model of which no two weights are alike: constants (norms, biases) would hide a swap."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.data)
    return model.to(DTYPES[dtype])


def save_all(directory: Path) -> None:
    """Every case in every dtype, as directory/case/dtype."""
    for case, config in CONFIGS.items():
        model = build(config)
        for name, dtype in DTYPES.items():
            model.to(dtype).save_pretrained(directory / case / name)


def save_encoders(directory: Path) -> None:
    """Every case that is no decoder, in fp32, as directory/case."""
    for case, config in ENCODER_CASES.items():
        make_model(config).save_pretrained(directory / case)


def changed(source: Path, target: Path, change: Callable[[Tensors], Tensors] = dict, **fields: Any) -> Path:
    """`target`, a directory with other tensors and with some fields of its config replaced; None removes one."""
    target.mkdir(parents=True, exist_ok=True)
    save_file(change(load_file(source / "model.safetensors")), target / "model.safetensors", metadata={"format": "pt"})
    config = {**json.loads((source / "config.json").read_text()), **fields}
    config = {name: value for name, value in config.items() if value is not None}
    (target / "config.json").write_text(json.dumps(config))
    return target


def opened(directory: Path) -> HFWeights:
    return HFWeights(directory, read_model(directory))


def hashes(directory: Path) -> dict[str, str]:
    """Name -> dtype, shape and SHA-256 of the bytes of every tensor in a directory."""
    source = open_directory(directory)
    found = {}
    for name in source.names:
        data = source.tensor(name).reshape(-1).view(torch.uint8).numpy().tobytes()
        found[name] = f"{source.dtype(name)} {source.shape(name)} {hashlib.sha256(data).hexdigest()}"
    return found


def declarations(weights: HFWeights) -> dict[str, ParamSpec]:
    """Native name -> declaration, from the model itself."""
    with torch.device("meta"):
        model = SequentialModel(weights.model.core.build_layers())
    return {name: parameter.spec for name, parameter in model.named_parameters()}


def gathered(weights: HFWeights, name: str, spec: ParamSpec, size: int) -> torch.Tensor:
    """The shards of all tensor ranks, put together and without padding; ranks that hold the same shard agree on it."""
    shards = [weights.shard(name, spec, axes_at(tensor=(rank, size))) for rank in range(size)]
    assert all(shard.shape == spec.local_shape(axes_at(tensor=(0, size))) for shard in shards), name
    if not spec.splits:
        assert all(torch.equal(shard, shards[0]) for shard in shards), name
        return shards[0]
    (split,) = spec.splits
    holders = size // split.num_shards(size)
    firsts = shards[::holders]
    assert all(torch.equal(shard, firsts[rank // holders]) for rank, shard in enumerate(shards)), name
    return torch.cat(firsts, dim=split.dim).narrow(split.dim, 0, spec.shape[split.dim])


def export(
    weights: HFWeights,
    target: Path,
    *,
    tensor_size: int = 1,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    after_each: Callable[[str, torch.Tensor], None] = lambda name, tensor: None,
    **sources: Any,
) -> None:
    """Read a directory as so many tensor ranks would, and export it again."""
    with exporting(target, weights.model, dtype, max_shard_size) as out:
        for name, spec in declarations(weights).items():
            tensor = gathered(weights, name, spec, tensor_size)
            out.add(name, tensor)
            after_each(name, tensor)
        out.finish(**sources)
