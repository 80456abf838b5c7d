"""Adapters in the format of Hugging Face's peft: configs, tables of their tensors, export."""
