"""Tests of what is read from and written to the Hugging Face hub, on a local stand-in of it."""
