"""The picture of goodput over the interval."""

from pathlib import Path

from megatron_ds.planner.failures.closed_forms import Faults, Saving
from megatron_ds.planner.failures.goodput_plot import draw_goodput


def test_picture(tmp_path: Path) -> None:
    path = tmp_path / "made" / "goodput.png"
    sizes = {"1,024 GPUs": Faults(128), "16,384 GPUs": Faults(2048)}
    draw_goodput(sizes, Saving(10.0, 60.0), path, "Goodput", days=2)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG") and (int.from_bytes(data[16:20]), int.from_bytes(data[20:24])) == (1200, 750)
    draw_goodput({"8 GPUs": Faults(1)}, Saving(0.0), path, "Goodput", days=2)
    assert path.read_bytes() != data
