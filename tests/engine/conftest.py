"""Reference runs of parity serve here too."""

from tests.parity.conftest import references

__all__ = ["references"]
