"""A run's report, `report.html`, and the record of its starts and ends that it shows."""

from megatron_ds.monitor.report.page import REPORT, write_report
from megatron_ds.monitor.report.sessions import SESSIONS, write_end, write_start

__all__ = ["REPORT", "SESSIONS", "write_end", "write_report", "write_start"]
