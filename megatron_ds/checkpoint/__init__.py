"""Checkpoints: a Hugging Face directory plus the training state, written once, loaded at any layout, never half there.

The training state is fp32 masters and optimizer moments as boxes of logical (whole) tensors in safetensors files, and
one small JSON. PyTorch's distributed checkpoint was the obvious base; its safetensors storage holds one chunk of a
tensor a file, where a ZeRO fragment is several, its other storage is a pickle, and neither has checksums.
"""
