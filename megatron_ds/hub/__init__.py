"""Models on the Hugging Face hub: their ids, the download of what is read of them, and the upload of exports.

Everything goes through huggingface_hub: its cache, `HF_HOME`, `HF_TOKEN`, `HF_ENDPOINT` and `HF_HUB_OFFLINE` count.
"""

from megatron_ds.hub.ids import HubId, hub_id, name_of, parse_id, snapshot_of
from megatron_ds.hub.push import describe_upload, prepare_push, push
from megatron_ds.hub.snapshot import (
    download_hint,
    exists,
    fetch,
    local_directory,
    pinned,
    pinned_dataset,
    read_header,
    read_headers,
    size_of,
)

__all__ = [
    "HubId",
    "describe_upload",
    "download_hint",
    "exists",
    "fetch",
    "hub_id",
    "local_directory",
    "name_of",
    "parse_id",
    "pinned",
    "pinned_dataset",
    "prepare_push",
    "push",
    "read_header",
    "read_headers",
    "size_of",
    "snapshot_of",
]
