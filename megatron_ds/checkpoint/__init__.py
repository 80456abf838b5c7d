"""Checkpoints: a Hugging Face directory and the training state, written atomically, loaded at any layout.

The training state is fp32 masters and optimizer moments as slices of logical (full) tensors in safetensors files, and
one small JSON. PyTorch's distributed checkpoint was the obvious base, but its safetensors storage holds one chunk of a
tensor per file, and a rank's part of ZeRO's state consists of several; its other storage is a pickle; neither has
checksums.
"""
