"""Rank-aware logging: rank 0 speaks, the others only warn, and every line of theirs names its rank.

Also what other libraries may say meanwhile: errors, and warnings that a user can act on, but no chatter.
"""

import logging
import os
import sys
import warnings

LOGGER_NAME = "megatron_ds"

# DeepSpeed calls these by names that torch 2.13 has given new ones; only DeepSpeed can act on it.
_RENAMED_COLLECTIVES = r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated"


def get_logger(name: str = "") -> logging.Logger:
    """The package's logger, or its child `megatron_ds.<name>`."""
    return logging.getLogger(f"{LOGGER_NAME}.{name}" if name else LOGGER_NAME)


def setup_logging(rank: int, level: int = logging.INFO) -> None:
    """Send the package's log lines to stderr: rank 0 from `level` on, other ranks from WARNING on, with their rank."""
    logger = logging.getLogger(LOGGER_NAME)
    logger.propagate = False
    logger.setLevel(level if rank == 0 else max(level, logging.WARNING))
    handler = logging.StreamHandler(sys.stderr)
    prefix = "" if rank == 0 else f"rank {rank}: "
    handler.setFormatter(logging.Formatter(f"{prefix}%(message)s"))
    logger.handlers = [handler]


def quiet_libraries() -> None:
    """Silence what DeepSpeed, transformers and datasets say about themselves. Call it before they are imported.

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
