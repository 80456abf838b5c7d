"""TensorBoard: event files under the run's output, for `tensorboard --logdir`."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from megatron_ds.config import dump_run
from megatron_ds.monitor.sinks import SINKS, SinkInfo
from megatron_ds.monitor.trackers.ids import known_id
from megatron_ds.monitor.trackers.tracker import Tracker
from megatron_ds.monitor.trackers.values import Line, flat_settings, name_of_run

FLUSH_S = 30


@SINKS.register("tensorboard")
class TensorBoard(Tracker):
    """Writer of event files. A resumed run hides the steps after its checkpoint.

    Args:
        info: the run.
        directory: log directory, which may be shared by runs; None = `tensorboard` in the run's output.
        run_name: the name of the run, a number is added; None = that of the output directory.
    """

    package: ClassVar[str | None] = "tensorboard"
    extra: ClassVar[str] = "tensorboard"
    rewinds: ClassVar[bool] = True

    def __init__(self, info: SinkInfo, *, directory: str | None = None, run_name: str | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        log_dir = Path(directory) if directory is not None else info.output / "tensorboard"
        before = known_id(info)
        name = before or _new_name(log_dir, info, run_name)
        purge = None if info.continue_after is None else info.continue_after + 1
        self._writer = SummaryWriter(str(log_dir / name), purge_step=purge, flush_secs=FLUSH_S)
        if before is None:
            self._writer.add_text("run file", f"```yaml\n{dump_run(info.run)}```")
            for summary in hparams(flat_settings(info), {"train/loss": 0.0, "valid/loss": 0.0}):
                self._writer._get_file_writer().add_summary(summary)
        super().__init__(info, name)

    def log(self, line: Line) -> None:
        """Write each number as a scalar."""
        for name, value in line.values.items():
            self._writer.add_scalar(name, value, line.step)

    def finish(self) -> None:
        """Flush and close the files."""
        self._writer.close()


def _new_name(log_dir: Path, info: SinkInfo, given: str | None) -> str:
    """Return `<name>_<n>` with the smallest n from 1 on that is free."""
    name = name_of_run(info, given)
    number = 1
    while (log_dir / f"{name}_{number}").exists():
        number += 1
    return f"{name}_{number}"
