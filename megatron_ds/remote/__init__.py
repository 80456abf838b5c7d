"""Files on object stores and web servers: s3://, gs://, hf://, http:// and others, through fsspec.

A store is read and written by a process of its own (`worker`), because the clients start threads, and processes with
threads cannot be forked into ranks.
"""

from megatron_ds.remote.copies import local_data, local_files
from megatron_ds.remote.store import RemoteFile, Store, Transfer
from megatron_ds.remote.urls import is_url, require_client

__all__ = ["RemoteFile", "Store", "Transfer", "is_url", "local_data", "local_files", "require_client"]
