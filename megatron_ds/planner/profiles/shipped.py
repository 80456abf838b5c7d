"""Profiles by name or file: those that come with the package, and those that `megatron-ds plan --calibrate` wrote."""

from __future__ import annotations

import difflib
import re
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from megatron_ds.config import build_section
from megatron_ds.config.schema_base import Section
from megatron_ds.config.yaml_text import parse_yaml
from megatron_ds.errors import ConfigError, show, suggest
from megatron_ds.monitor import peak_flops
from megatron_ds.planner.profiles.device import Device
from megatron_ds.planner.profiles.link import CardKind, Link
from megatron_ds.planner.profiles.network import Network
from megatron_ds.untrusted import is_missing, read_text
from megatron_ds.untrusted.limits import PROFILE

S = TypeVar("S", bound=Section)

_FOLDER = Path(__file__).parent
_MEASURED = ".measured"
_SPEED = re.compile(
    r"(?:(?P<kind>[a-z]+) +)?(?:(?P<cards>\d{1,3}) ?x ?)?(?P<rate>\d{1,6}(?:\.\d{1,3})?) ?(?P<unit>Gb/s|Gbps|GB/s)"
)
_DEFAULT_KIND = "infiniband"
CARDS = ("infiniband", "roce", "omnipath", "ethernet")
"""Kinds of network cards that a text may name."""


def device_names() -> list[str]:
    """Return the names of the devices whose profiles come with the package."""
    return sorted(path.stem for path in (_FOLDER / "devices").glob("*.yaml") if not path.stem.endswith(_MEASURED))


def measured_file_name(device: Device) -> str:
    """Return the name of the file of a measured profile: with it, in the folder of the shipped ones, it adds to one.

    That is `NAME.measured.yaml` with the name of the shipped profile of the same GPU, or else the GPU's own.
    """
    if device.gpu is None:
        return f"{device.type}{_MEASURED}.yaml"
    same = [one for one in device_names() if find_device(one).gpu == device.gpu]
    return f"{same[0] if same else re.sub('[^a-z0-9]+', '-', device.gpu.lower()).strip('-')}{_MEASURED}.yaml"


def find_device(name: str, *, measured: bool = True) -> Device:
    """Return the profile of a device.

    Args:
        name: one of `device_names`, or the path of a YAML file.
        measured: a shipped profile has the times that were measured on such a device, if a file of them comes with the
            package; False = the numbers of data sheets and publications alone.

    Raises:
        ConfigError: neither; the file cannot be read, or one of its values is wrong.
    """
    if _is_path(name):
        return _read_device(Path(name), Path(name).stem)
    if name.lower() not in device_names():
        raise ConfigError(
            f"--device={show(name)} is not a known device; {suggest(name.lower(), device_names())} A file of your own, "
            "written by `megatron-ds plan --calibrate FILE.yaml`, is named by its path"
        )
    return _shipped_device(name.lower(), measured)


def find_by_gpu(name: str) -> Device | None:
    """Return the profile that comes with the package for a GPU, or for the most similar one with the same peak.

    Args:
        name: the name that `torch.cuda.get_device_name` returns.
    """
    devices = [find_device(one) for one in device_names()]
    same = [device for device in devices if device.gpu is not None and device.gpu == name]
    if same:
        return same[0]
    peak = peak_flops(name, "fp16")
    alike = {device.gpu: device for device in devices if device.gpu and peak_flops(device.gpu, "fp16") == peak}
    close = difflib.get_close_matches(name, alike, n=1) if peak is not None else []
    return alike[close[0]] if close else None


def find_network(text: str | None, device: Device, gpus_per_node: int) -> Network:
    """Return the network of a cluster.

    Args:
        text: speed of the network cards, with their kind (infiniband if not given) and their number in a node (one for
            each GPU if not given): `400Gb/s`, `roce 400Gb/s`, `omnipath 4x100Gb/s`; None = the usual ones.
        device: profile of the devices, which knows the link inside a node.
        gpus_per_node: devices of a node.

    Raises:
        ConfigError: the text is no such speed.
    """
    given = text if text is not None else device.network
    found = _SPEED.fullmatch(given.strip())
    if found is None:
        raise ConfigError(
            f"--network={show(given)} is not the speed of network cards; try 400Gb/s (one card for each GPU), or a "
            f"kind ({', '.join(CARDS)}) and the cards of a node: `ethernet 2x100Gb/s`"
        )
    kind = found["kind"] or _DEFAULT_KIND
    if kind not in CARDS:
        raise ConfigError(
            f"--network={show(given)}: {show(kind)} is not a kind of network card; {suggest(kind, CARDS)}"
        )
    cards = int(found["cards"]) if found["cards"] else gpus_per_node
    card_gb_s = float(found["rate"]) / (1 if found["unit"] == "GB/s" else 8)
    if cards == 0 or card_gb_s == 0:
        raise ConfigError(f"--network={show(given)} has no speed; try 400Gb/s")
    inside = device.link if isinstance(device.link, Link) else _shipped_link(device.link)
    island = max(gpus_per_node, device.island or 1)
    name = f"{cards} x {found['rate']}{found['unit']} {kind}"
    return Network(name, inside, _cards(kind).link(card_gb_s * cards / gpus_per_node), island)


def _is_path(name: str) -> bool:
    return "/" in name or name.endswith((".yaml", ".yml"))


@cache
def _shipped_device(name: str, measured: bool) -> Device:
    device, file = _read_device(_FOLDER / "devices" / f"{name}.yaml", name), f"{name}{_MEASURED}.yaml"
    if not measured or not (_FOLDER / "devices" / file).is_file():
        return device
    times = _read_device(_FOLDER / "devices" / file, name)
    fields = [field for field in Device.model_fields if field.startswith("measured_")]
    tables = {field: getattr(times, field) for field in ("steady", *fields)}
    link = times.link if isinstance(times.link, Link) else device.link
    return device.model_copy(update={**tables, "link": link, "source": f"{device.source} {times.source}"})


@cache
def _shipped_link(name: str) -> Link:
    return _build(_FOLDER / "networks" / f"{name}.yaml", Link)


@cache
def _cards(kind: str) -> CardKind:
    return _build(_FOLDER / "networks" / f"{kind}.yaml", CardKind)


def _read_device(path: Path, name: str) -> Device:
    device = _build(path, Device, {"name": name})
    if isinstance(device.link, str):
        links = [one.stem for one in (_FOLDER / "networks").glob("*.yaml") if one.stem not in CARDS]
        if device.link not in links:
            raise ConfigError(f"{path}: link={show(device.link)} is not a known link; {suggest(device.link, links)}")
    return device


def _build(path: Path, kind: type[S], more: dict[str, Any] | None = None) -> S:
    try:
        text = read_text(path, PROFILE, ConfigError)
    except ConfigError as problem:
        if is_missing(problem):
            raise ConfigError(f"profile {path} does not exist (looked from {Path.cwd()})") from None
        raise
    mapping = parse_yaml(text, str(path), PROFILE)
    if not isinstance(mapping, dict):
        raise ConfigError(f"{path} is not a profile: it holds {show(mapping)}; {PROFILE.fix}")
    return build_section(kind, {**(more or {}), **mapping}, f"{path}: {kind.__name__.lower()}")
