"""Training: from a run file to metrics and a Hugging Face directory.

The package can be called: `mds.train(run)` is `megatron_ds.train.launch.train(run)`. Once any module of it is imported,
Python binds the name `megatron_ds.train` to the package, whatever stood there before; so it is both.
"""

import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> None:
        from megatron_ds.train.launch import train

        train(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
