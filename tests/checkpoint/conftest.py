"""Reference runs of parity, and models on disk, serve here too."""

from tests.hf.conftest import encoders, saved
from tests.parity.conftest import references

__all__ = ["encoders", "references", "saved"]
