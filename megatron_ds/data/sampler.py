"""The samples of each step and of each rank: pure functions, with no state to save or restore.

The order of samples is a function of (number of samples, global batch size, seed, step) alone: a run that
is interrupted and resumed, at any layout, continues with the samples that it would have had.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from megatron_ds.data.collate import NO_SAMPLE
from megatron_ds.data.noise.seeded_random import SeededRandom
from megatron_ds.errors import ConfigError, TopologyError


class GlobalBatches:
    """An endless stream of samples, epoch after epoch, cut into global batches of G.

    Position p of the stream is in epoch e = p // n; a batch may straddle epochs, and none is dropped. Sample i of
    epoch e has the index e * n + i, from which noise is computed, so that it differs in every epoch. With `shuffle`
    each epoch has its own permutation, a function of (seed, epoch).

    Args:
        num_samples: n.
        global_batch_size: G.
        seed: `train.seed`, not negative.
        shuffle: False gives batch k the indices [k*G, (k+1)*G): samples in the order of the files.
    """

    def __init__(self, num_samples: int, global_batch_size: int, seed: int, shuffle: bool) -> None:
        assert num_samples > 0, f"{num_samples} samples"
        assert global_batch_size > 0, f"global batch of {global_batch_size}"
        if seed < 0:
            raise ConfigError(f"train.seed={seed} must not be negative; nearest: 0")
        self.num_samples = num_samples
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.shuffle = shuffle
        self._orders: dict[int, np.ndarray] = {}

    def indices(self, step: int) -> np.ndarray:
        """Return the samples of 0-based `step`, counted from the start of the stream; see `indices_from`."""
        return self.indices_from(step * self.global_batch_size)

    def indices_from(self, position: int, size: int | None = None) -> np.ndarray:
        """Return the samples of the batch that begins at a position: (size,) int64, e * n + i for sample i of epoch e.

        Args:
            position: in the stream.
            size: number of samples; None = G.
        """
        assert position >= 0, f"position {position}"
        positions = position + np.arange(self.global_batch_size if size is None else size, dtype=np.int64)
        if not self.shuffle:
            return positions
        epochs, offsets = np.divmod(positions, self.num_samples)
        needed = range(int(epochs[0]), int(epochs[-1]) + 1)
        self._orders = {epoch: self._order(epoch) for epoch in needed}
        order = np.concatenate([self._orders[epoch][offsets[epochs == epoch]] for epoch in needed])
        return epochs * self.num_samples + order

    def _order(self, epoch: int) -> np.ndarray:
        """Return the permutation of an epoch, (n,) int64; the previous batch's is reused."""
        if epoch in self._orders:
            return self._orders[epoch]
        return SeededRandom(self.seed, epoch).order(self.num_samples)


def for_data_rank(
    indices: Sequence[int] | np.ndarray, data_rank: int, data_size: int, micro_batch_size: int
) -> list[np.ndarray]:
    """Return the micro-batches of one data-parallel rank: G / (data_size * B) arrays of (B,) int64.

    With B the micro-batch size, micro-batch m of rank d holds samples [(m * data_size + d) * B, ... + B) of the global
    batch: at any moment the ranks work on one consecutive run of samples. Tensor and pipeline ranks of the
    same data rank get the same samples.

    Raises:
        TopologyError: G is not a multiple of data_size * B.
    """
    assert 0 <= data_rank < data_size, f"data rank {data_rank} of {data_size}"
    samples_at_once = data_size * micro_batch_size
    if len(indices) == 0 or len(indices) % samples_at_once:
        below = len(indices) // samples_at_once * samples_at_once
        nearest = f"{below} or {below + samples_at_once}" if below else str(samples_at_once)
        raise TopologyError(
            f"train.global_batch_size={len(indices)} is not a multiple of data ranks x micro_batch_size = "
            f"{data_size} x {micro_batch_size} = {samples_at_once}; nearest: {nearest}"
        )
    grid = np.asarray(indices, dtype=np.int64).reshape(-1, data_size, micro_batch_size)
    return list(grid[:, data_rank])


def ordered_pass(num_samples: int, global_batch_size: int) -> Iterator[np.ndarray]:
    """Yield every sample once, in order, for validation: (G,) int64 arrays, the last completed with NO_SAMPLE."""
    for start in range(0, num_samples, global_batch_size):
        batch = np.arange(start, start + global_batch_size, dtype=np.int64)
        batch[batch >= num_samples] = NO_SAMPLE
        yield batch
