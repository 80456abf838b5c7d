"""Limits of each kind of file: the table that all readers share.

Each limit is several times what the largest file known to us needs: an index of 140,000 tensors has 15 MB, the settings
of a classifier of 21,000 classes 1 MB. Within them no file takes more than about 400 MB of memory to read.
"""

from dataclasses import dataclass

_MB = 1 << 20
_INT64 = 2**63 - 1


@dataclass(frozen=True)
class Limits:
    """Limits of a kind of file.

    Attributes:
        name: of the kind, with its article, for errors.
        fix: the action that mends such a file, for errors.
        max_bytes: of the file, or of one line of it where it is read by lines.
        max_depth: of lists and mappings in one another.
        max_values: number of values in all lists and mappings; a value that YAML repeats by an alias counts each time.
        max_characters: of one text or key.
        max_integer: largest absolute value of an integer.
    """

    name: str
    fix: str
    max_bytes: int
    max_depth: int
    max_values: int
    max_characters: int
    max_integer: int = _INT64


_AGAIN = "try to download or export it again"
_RUN = "try the file of a complete run"

MODEL_SETTINGS = Limits("the settings of a model", _AGAIN, 8 * _MB, 64, 200_000, 2 * _MB)
TOKENIZER_SETTINGS = Limits("the settings of a tokenizer", _AGAIN, 32 * _MB, 64, 1_000_000, 2 * _MB, 10**36)
"""transformers writes 10^30 as the length of a tokenizer without a limit."""
TOKENIZER = Limits("a tokenizer", _AGAIN, 256 * _MB, 64, 6_000_000, 2 * _MB, 10**36)
WEIGHT_INDEX = Limits("an index of weights", _AGAIN, 64 * _MB, 8, 1_000_000, 4096)
TENSOR_HEADER = Limits("a header of safetensors", _AGAIN, 100_000_000, 8, 2_000_000, _MB)
"""100,000,000 bytes are the limit of the format."""
RUN_FILE = Limits("a run file", "try a smaller file", _MB, 64, 50_000, _MB, 10**36)
DEEPSPEED_SETTINGS = Limits("a DeepSpeed JSON", "try a smaller file", _MB, 32, 20_000, 65_536)
PROFILE = Limits("a profile of a device", "try `megatron-ds plan --calibrate` again", 4 * _MB, 8, 200_000, 65_536)
"""A calibrated machine has some 500 measured times of up to 10 values."""
CHECKPOINT_RECORD = Limits("a record of a checkpoint", "try an older checkpoint", 64 * _MB, 32, 1_000_000, _MB)
RUN_RECORD = Limits("a record of a run", _RUN, 64 * _MB, 32, 1_000_000, _MB)
RUN_LINE = Limits("a line of a run's record", _RUN, 4 * _MB, 32, 100_000, _MB)
DATA_RECORD = Limits("a record of prepared data", "try `megatron-ds prepare` again", 64 * _MB, 16, 1_000_000, _MB)
"""Each source file has some five values there; published corpora have up to 50,000 files."""
CACHE_RECORD = Limits("a record of a cache", "try to remove it", 16 * _MB, 4, 100_000, _MB)
ROW = Limits("a row of data", "try to cut long documents", 128 * _MB, 512, 2_000_000, 128 * _MB)
LOCK_OWNER = Limits("the owner of a lock", "try to remove it if nothing uses the directory", 4096, 2, 32, 1024)
SHORT_TEXT = Limits("a name", _RUN, 4096, 0, 0, 4096)
