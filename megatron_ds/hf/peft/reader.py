"""The tensors of a file of peft as native parameters, of present and old versions, safetensors or .bin."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from megatron_ds.errors import ConversionError
from megatron_ds.hf.family import EMBEDDING, Row
from megatron_ds.hf.peft.adapters import PREFIX, Adapters
from megatron_ds.hf.peft.config import ADAPTER_BIN, ADAPTER_CONFIG, ADAPTER_WEIGHTS, find_weights
from megatron_ds.hf.peft.projections import in_memory
from megatron_ds.hf.peft.saved_modules import head_name
from megatron_ds.hf.tensor_files import read_table
from megatron_ds.hf.tensor_mapping import Reader
from megatron_ds.hf.weight_files import TensorSource
from megatron_ds.hf.weights import read_shard
from megatron_ds.layers.param_spec import ParamSpec
from megatron_ds.parallel.grid import Axes

_ADAPTER_TENSOR = re.compile(
    r"(?P<module>.*)\.(?:(?P<layer>lora_[AB])(?:\.\w+)?\.weight|(?P<vector>lora_embedding_[AB]|lora_magnitude_vector|ia3_l)"
    r"(?:\.\w+)?(?:\.weight)?)"
)
_WRAPPED = re.compile(r"\.(?:modules_to_save(?:\.(?!weight$|bias$)\w+)?|base_layer(?!\.lora_))(?=\.)")
_OF_ONE_EXPERT = re.compile(r"\.experts\.\d+\..*\.lora_")
_OUTER = re.compile(rf"^(?:module\.|_orig_mod\.|{re.escape(PREFIX)})+")


class AdapterReader:
    """Reader of adapters' native parameters from a directory in peft's format. Opening it accounts for every tensor.

    Args:
        directory: directory with adapter_model.safetensors or adapter_model.bin, of which only tensors are loaded.
        adapters: the adapters by its config.

    Attributes:
        adapters: the same, with the base parameters that the file replaces.

    Raises:
        ConversionError: no weights, or a tensor is missing, unexpected or of another shape.
    """

    def __init__(self, directory: str | Path, adapters: Adapters) -> None:
        self.directory = Path(directory)
        file = find_weights(directory)
        if file is None:
            raise ConversionError(f"{directory}: no {ADAPTER_WEIGHTS} or {ADAPTER_BIN} here")
        self._source = TensorSource(self.directory, {file: read_table(file)})
        self._on_disk = _canonical_names(self.directory, self._source.names, adapters)
        self._keep_one_of_tied(adapters)
        self.adapters = self._with_replaced(adapters)
        self._account()

    def shard(self, name: str, spec: ParamSpec, axes: Axes) -> Tensor:
        """Read a rank's shard of one native parameter; see `HFWeights.shard`."""
        row = self.adapters.table[name]
        return read_shard(row, self.adapters.axis_sizes, self._reader(row), spec, axes)

    def full(self, name: str) -> Tensor:
        """Read one full native parameter."""
        row = self.adapters.table[name]
        return row.op.read(self._reader(row), self.adapters.axis_sizes)

    def _reader(self, row: Row) -> Reader:
        return lambda source: self._source.tensor(self._on_disk[row.names[source]])

    def _with_replaced(self, adapters: Adapters) -> Adapters:
        """Add the base parameters in the file that the config does not train in full."""
        table = adapters.base_rows
        found = {
            native
            for native, row in table.items()
            if native not in adapters.saved and all(f"{PREFIX}{name}" in self._on_disk for name in row.names)
        }
        of_vocabulary = [native for native, row in table.items() if "v" in row.op.native_axes]
        vocab_size = adapters.model.core.vocab_size
        if found.union(adapters.saved).issuperset(of_vocabulary):
            names = (self._on_disk.get(f"{PREFIX}{table[native].names[0]}") for native in of_vocabulary)
            lengths = {self._source.shape(name)[0] for name in names if name is not None}
            vocab_size = lengths.pop() if len(lengths) == 1 else vocab_size
        return adapters.with_replaced(frozenset(found), vocab_size)

    def _account(self) -> None:
        sizes, where = self.adapters.axis_sizes, self.directory
        wanted = {
            name: row.op.source_shape(source, sizes)
            for row in self.adapters.table.values()
            for source, name in enumerate(row.names)
        }
        for what, names in (
            ("missing", wanted.keys() - self._on_disk.keys()),
            ("unexpected", {self._on_disk[name] for name in self._on_disk.keys() - wanted.keys()}),
        ):
            if names:
                raise ConversionError(f"{where}: {what} {min(names)}, by its {ADAPTER_CONFIG} and this model")
        for name, shape in wanted.items():
            found = self._source.shape(self._on_disk[name])
            if found != shape:
                raise ConversionError(
                    f"{where}: {self._on_disk[name]} has shape {list(found)}, its {ADAPTER_CONFIG} and this model say "
                    f"{list(shape)}"
                )

    def _keep_one_of_tied(self, adapters: Adapters) -> None:
        """Leave out a tied head that equals the embedding in the same file; one without embedding stands for it.

        Raises:
            ConversionError: they differ.
        """
        head = head_name(adapters.model)
        if not adapters.model.core.tied or head is None or PREFIX + head not in self._on_disk:
            return
        (name,) = adapters.model.table[EMBEDDING].names
        theirs = self._on_disk.pop(PREFIX + head)
        ours = self._on_disk.setdefault(PREFIX + name, theirs)
        if not self._source.same_bytes(theirs, ours):
            raise ConversionError(f"{self.directory}: {theirs} differs from {ours}, and the base ties them")


def _canonical_names(directory: Path, names: Iterable[str], adapters: Adapters) -> dict[str, str]:
    """Return peft's present name of each tensor -> its name in the file.

    Files differ in wrappers of the model (`module.`, `_orig_mod.`), in names of adapters (`.default.`), in wrappers of
    modules (`.modules_to_save.`, `.base_layer.`), and in the model inside: bare, with a head, or in a larger model.

    Raises:
        ConversionError: two tensors have the same name, as those of two adapters do; or one is of a single expert.
    """
    found: dict[str, str] = {}
    for name in names:
        if ".original_module." in name:
            continue
        if _OF_ONE_EXPERT.search(name):
            raise ConversionError(
                f"{directory}: {name} is of a single expert, as in transformers before version 5; try to load it with "
                "peft and save it again"
            )
        canonical = _canonical(name)
        if canonical in found:
            raise ConversionError(
                f"{directory}: {found[canonical]} and {name} are one tensor; keep those of one adapter"
            )
        found[canonical] = name
    lead, usual = _lead(found, adapters)
    base = in_memory(adapters.base)
    known = {name for row in base.family.table(base.core).values() for name in row.names}
    return {
        PREFIX + (usual + name.removeprefix(lead) if name not in known and name.startswith(lead) else name): there
        for name, there in found.items()
    }


def _canonical(name: str) -> str:
    """Return a tensor's name without the wrappers of model and modules, and without the adapter's name."""
    bare = _WRAPPED.sub("", _OUTER.sub("", name).replace("_orig_mod.", ""))
    match = _ADAPTER_TENSOR.fullmatch(bare)
    if match is None:
        return bare
    layer = match["layer"]
    return f"{match['module']}.{layer}.weight" if layer else f"{match['module']}.{match['vector']}"


def _lead(names: Mapping[str, str], adapters: Adapters) -> tuple[str, str]:
    """Return the prefix of the adapters' names in a file, and the prefix that they have here, before their place in the
    body of the model; two empty texts if the prefixes are equal or unknown."""
    usual = adapters.base.family.prefix
    wanted = [name.removeprefix(PREFIX) for name in adapters.tensors]
    if any(name in names for name in wanted):
        return "", ""
    inner = {name.removeprefix(usual) for name in wanted if name.startswith(usual)}
    first = next((name for name in names if ".lora_" in name or name.endswith(".ia3_l")), None)
    for name in inner:
        if first is None:
            break
        if first == name or first.endswith(f".{name}"):
            return first.removesuffix(name), usual
    return "", ""
