"""Configs of models on the Hugging Face hub, one file each, named organisation--model.

`hub/` holds them byte for byte as public packages do; `hub/SOURCES` says which. `published/` was written down from what
is published: a value may differ from today's file, the fields are what counts.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
Config = dict[str, Any]


class Source(NamedTuple):
    """A line of SOURCES: where a file of `hub/` comes from, and what becomes of it."""

    file: str
    package: str
    version: str
    path: str
    sha256: str
    outcome: str


def _read(folder: str) -> dict[str, Config]:
    files = sorted((HERE / folder).glob("*.json"))
    return {file.stem.replace("--", "/"): json.loads(file.read_text(encoding="utf-8")) for file in files}


LINES = (HERE / "hub" / "SOURCES").read_text(encoding="utf-8").splitlines()
SOURCES = [Source(*line.split("\t")) for line in LINES if not line.startswith("#")]
VERBATIM = _read("hub")
OUTCOME = {source.file.removesuffix(".json").replace("--", "/"): source.outcome for source in SOURCES}
REFUSED = {name: config for name, config in VERBATIM.items() if OUTCOME.get(name) == "refused"}
# All configs that are read.
HUB: dict[str, Config] = {**_read("published"), **{name: VERBATIM[name] for name in VERBATIM if name not in REFUSED}}
