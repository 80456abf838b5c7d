"""Rank-aware logging: rank 0 speaks, the others only warn, and every line of theirs names its rank."""

import logging
import sys

LOGGER_NAME = "megatron_ds"


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
