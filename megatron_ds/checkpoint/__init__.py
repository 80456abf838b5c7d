"""Checkpoints: a Hugging Face directory plus the training state, written once, loaded at any layout, never incomplete.

The training state is fp32 masters and optimizer moments as slices of logical (full) tensors in safetensors files, and
one small JSON. PyTorch's distributed checkpoint was the obvious base; its safetensors storage holds one chunk of a
tensor per file, where a rank's part of ZeRO's state consists of several, its other storage is a pickle, and neither has
checksums.
"""
