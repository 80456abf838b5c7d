"""10,000 mutated inputs over all readers: each is read, or refused in one line; nothing is executed, hangs, or swells.

`python -m tests.untrusted.test_mutations [NUM_INPUTS [READER ...]]` runs them and prints a table. An input is the name
of its reader and a number, so that a fault can be run again; those that were faults once are kept in `KEPT`.
"""

import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest

from tests.untrusted.limited_process import Outcome, run_inputs
from tests.untrusted.readers import READERS

KEPT: dict[str, tuple[int, ...]] = {
    "adapters": (1070,),
    "saved sections": (1229,),
    "copied tokenizer": (1118, 1109, 1198, 1221),
    "CSV": (1069,),
}
"""Reader -> numbers of inputs that were faults of an earlier version."""
NUM_IN_SUITE, NUM_INPUTS = 8, 10_000
FIRST_OF_SWEEP = 1000


def faults(name: str, seeds: list[int], folder: Path) -> list[Outcome]:
    return [one for one in run_inputs(name, READERS[name], seeds, folder) if one.fault]


@pytest.mark.parametrize("name", READERS)
def test_files_as_they_are_written_are_read(name: str, tmp_path: Path) -> None:
    READERS[name].make(tmp_path)
    READERS[name].read(tmp_path)


@pytest.mark.parametrize("name", READERS)
def test_sample_of_mutated_inputs(name: str, tmp_path: Path) -> None:
    assert faults(name, [*KEPT.get(name, ()), *range(NUM_IN_SUITE)], tmp_path) == []


@pytest.mark.sweep
@pytest.mark.parametrize("name", READERS)
def test_mutated_inputs(name: str, tmp_path: Path) -> None:
    seeds = range(FIRST_OF_SWEEP, FIRST_OF_SWEEP + -(-NUM_INPUTS // len(READERS)))
    assert faults(name, list(seeds), tmp_path) == []


def main(num_inputs: int, names: list[str]) -> None:
    each = -(-num_inputs // len(names))
    total: Counter[str] = Counter()
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            found = run_inputs(name, READERS[name], range(FIRST_OF_SWEEP, FIRST_OF_SWEEP + each), Path(folder))
        counts = Counter("fault" if one.fault else "refused" if one.was_refused else "read" for one in found)
        total += counts
        print(f"{name:28} {counts['read']:6} read {counts['refused']:6} refused {counts['fault']:6} faults", flush=True)
        for fault, seeds in _by_text(found).items():
            print(f"    {len(seeds):4} x {fault} (such as {seeds[:3]})", flush=True)
    print(f"{'all':28} {total['read']:6} read {total['refused']:6} refused {total['fault']:6} faults")


def _by_text(found: list[Outcome]) -> dict[str, list[int]]:
    texts: dict[str, list[int]] = {}
    for one in found:
        if one.fault:
            texts.setdefault(one.fault, []).append(one.seed)
    return dict(sorted(texts.items(), key=lambda item: -len(item[1])))


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else NUM_INPUTS, sys.argv[2:] or list(READERS))
