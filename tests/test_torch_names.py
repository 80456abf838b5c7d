"""The code uses no name of torch that the oldest release in setup.py's range lacks."""

import ast
import re
from pathlib import Path

import pytest

from tests.torch_names import NEWER, names_used

ROOT = Path(__file__).parents[1]
FILES = sorted(path for folder in ("megatron_ds", "bench", "examples") for path in (ROOT / folder).rglob("*.py"))
NEWER_NAMES = frozenset(NEWER.read_text().split())


def newer_names(code: str) -> list[str]:
    return [f"line {line}: {name}" for line, name in names_used(ast.parse(code)) if name in NEWER_NAMES]


def test_no_name_is_newer_than_torch_2_11() -> None:
    found = {str(path.relative_to(ROOT)): newer_names(path.read_text()) for path in FILES}
    assert len(found) > 200
    assert {path: names for path, names in found.items() if names} == {}


def test_setup_states_the_release_that_the_list_begins_with() -> None:
    assert re.search(r'"torch>=2\.11,<2\.15"', (ROOT / "setup.py").read_text())


@pytest.mark.parametrize(
    "code",
    [
        "import torch.distributed as dist\ndist.all_gather_single(out, x)",
        "import torch\ntorch.distributed.reduce_scatter_single(out, x)",
        "from torch.distributed import all_gather_single as gather",
        "from torch import distributed\ndef f(x):\n    return distributed.all_gather_single(x, x)",
        "import torch\ntorch.set_default_device()\ntorch.backends.cuda.cublas_workspace_size()",
    ],
)
def test_a_newer_name_is_seen(code: str) -> None:
    assert newer_names(code)


def test_a_name_that_is_looked_up_by_its_text_may_be_newer() -> None:
    assert not newer_names("import torch.distributed as dist\ngetattr(dist, 'all_gather_single', None)")
