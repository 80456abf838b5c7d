"""Rank-aware logging: rank 0 logs from INFO on, other ranks from WARNING on, with their rank in every line.

Other libraries are limited to errors and to warnings that a user can act on.
"""

import contextlib
import logging
import os
import sys
import warnings

LOGGER_NAME = "megatron_ds"

SHOWN: set[str] = set()
"""Lines of `log_once` in this process."""

# torch 2.13 has renamed these collectives, and DeepSpeed calls them by the old names; a user cannot change that.
_RENAMED_COLLECTIVES = r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated"


def get_logger(name: str = "") -> logging.Logger:
    """Return the package's logger, or its child `megatron_ds.<name>`."""
    return logging.getLogger(f"{LOGGER_NAME}.{name}" if name else LOGGER_NAME)


def log_once(text: str) -> None:
    """Log a line, unless this process, or the one that it was forked from, has shown it before.

    The process that starts local ranks reads the model too, and shows no such lines: then rank 0 logs them.
    """
    if get_logger().isEnabledFor(logging.INFO) and text not in SHOWN:
        SHOWN.add(text)
        get_logger().info("%s", text)


def setup_logging(rank: int, level: int = logging.INFO) -> None:
    """Send the package's log lines to stderr: rank 0 from `level` on, other ranks from WARNING on, with their rank."""
    logger = logging.getLogger(LOGGER_NAME)
    logger.propagate = False
    logger.setLevel(level if rank == 0 else max(level, logging.WARNING))
    handler = logging.StreamHandler(sys.stderr)
    prefix = "" if rank == 0 else f"rank {rank}: "
    handler.setFormatter(logging.Formatter(f"{prefix}%(message)s"))
    logger.handlers = [handler]


def flush_streams() -> None:
    """Flush standard output and error, before a fork or an exit that would lose or double their text.

    What a closed or full stream cannot take is lost; the fork or the exit must happen.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # no stream, a lost one, a closed one
            stream.flush()


def quiet_libraries() -> None:
    """Silence the routine output of DeepSpeed, transformers and datasets. Call it before they are imported.

    DeepSpeed: log lines below ERROR. transformers: log lines below ERROR, unless TRANSFORMERS_VERBOSITY is set. Both
    Hugging Face libraries: progress bars, which each rank would draw over ours.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("DeepSpeed").addFilter(_is_error)  # DeepSpeed sets its level when imported; a filter stays
    warnings.filterwarnings("ignore", _RENAMED_COLLECTIVES, FutureWarning)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
