"""What can go wrong by the user's hand, as types.

The command line turns every `MegatronDSError` into one line on stderr and exit status 2; anything else is a defect
of ours and keeps its traceback. Each message names the field, its value, the rule, and the nearest fix.
"""


class MegatronDSError(Exception):
    """Base of all errors that a user can cause and mend."""


class ConfigError(MegatronDSError):
    """The run file, an override or the DeepSpeed JSON is wrong or contradicts itself."""


class TopologyError(ConfigError):
    """The model, the batch and the number of ranks cannot be divided as asked."""


class ConversionError(MegatronDSError):
    """A Hugging Face directory cannot be read or written without changing its meaning."""


class CheckpointError(MegatronDSError):
    """A checkpoint is missing, damaged or belongs to another run."""


class DataError(MegatronDSError):
    """Training data is missing, malformed or does not fit the model."""


class TrainingError(MegatronDSError):
    """A run cannot go on: its loss or gradient is not finite."""


class LaunchError(MegatronDSError):
    """A rank died, hung or could not be started."""
