"""Exclusive locks of files in directories that several machines may share, also where the file system has no flock."""

from megatron_ds.locks.file_lock import FileLock, LockHeldError

__all__ = ["FileLock", "LockHeldError"]
