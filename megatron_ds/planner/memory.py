"""Memory of one rank of a pipeline stage, by part, at the moment of a training step when it holds most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class StageMemory:
    """The memory of the rank of a pipeline stage that needs most of it.

    Attributes:
        stage: index of the pipeline stage.
        parts: part -> bytes on the device at the peak: "weights", "masters", "optimizer", "gradients", "buckets",
            "gathered weights", "activations", "temporaries", "boundaries" (what pipeline stages exchange), "batch",
            and on a GPU "context", "communication" and "fragmentation".
        when: the moment of the peak, such as "backward pass of blocks.3, micro-batch 2".
        host_parts: part -> bytes in host memory: what is offloaded, and copies of asynchronous saves.
        in_flight: the most micro-batches whose activations are held at once.
    """

    stage: int
    parts: Mapping[str, int]
    when: str
    host_parts: Mapping[str, int] = field(default_factory=dict)
    in_flight: int = 1

    @property
    def peak_bytes(self) -> int:
        """On the device."""
        return sum(self.parts.values())

    @property
    def host_bytes(self) -> int:
        """In host memory, of this rank."""
        return sum(self.host_parts.values())
