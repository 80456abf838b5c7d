"""Files on object stores and web servers: s3://, gs://, hf://, http:// and others, through fsspec.

A store is read and written by a process of its own (`worker`), because the clients start threads, and processes with
threads cannot be forked into ranks.
"""

from megatron_ds.remote.copies import address_of, local_data, local_files
from megatron_ds.remote.models import local_model, newest_checkpoint
from megatron_ds.remote.store import RemoteFile, Store, Transfer
from megatron_ds.remote.uploads import WEIGHTS, prepare_upload_to, upload_model
from megatron_ds.remote.urls import as_url, is_url, require_client, require_local

__all__ = [
    "WEIGHTS",
    "RemoteFile",
    "Store",
    "Transfer",
    "address_of",
    "as_url",
    "is_url",
    "local_data",
    "local_files",
    "local_model",
    "newest_checkpoint",
    "prepare_upload_to",
    "require_client",
    "require_local",
    "upload_model",
]
