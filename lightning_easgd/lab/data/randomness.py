"""Random augmentation as a function of what is augmented, not of what was drawn before."""

from collections.abc import Iterator
from typing import Any, final

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DistributedSampler
from typing_extensions import override

_GOLDEN = 0x9E3779B97F4A7C15
_WORD = 1 << 64


def random_words(stream: int, keys: NDArray[np.int64], count: int) -> NDArray[np.uint64]:
    """Return random bits that depend on nothing but the arguments.

    Each word is an output of SplitMix64 (Steele, Lea & Flood, *Fast splittable pseudorandom number generators*, 2014)
    whose state is a hash of the stream and the key. No generator is carried along: it does not matter in which
    process, batch or order a sample is augmented, and a run that resumes augments as the run before.

    Args:
        stream: Number of the stream, one for each worker and seed.
        keys: One for each sample, shape (N,).
        count: Words for each sample.

    Returns:
        Shape (count, N).
    """
    start = _mix(keys.astype(np.uint64) + _mix(np.full(1, stream % _WORD, np.uint64)))
    steps = (np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN))[:, None]
    return _mix(start[None] + steps)


def below(words: NDArray[np.uint64], bound: int) -> NDArray[np.int64]:
    """Turn random words into whole numbers from 0 to `bound` - 1; `bound` is far below 2^32."""
    return ((words >> np.uint64(32)) * np.uint64(bound) >> np.uint64(32)).astype(np.int64)


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


@final
class EpochKeys(DistributedSampler[Any]):
    """Draws as another sampler does, and says in which epoch: the key of a sample is epoch x size + its row.

    Keys travel to the DataLoader's processes with the batches; those processes live longer than an epoch and would
    not hear of a new one. It is a `DistributedSampler`, which Lightning neither replaces nor forgets to give the
    epoch to.

    Args:
        sampler: Draws the rows.
        size: Number of rows of the data set.
    """

    def __init__(self, sampler: DistributedSampler[Any], size: int) -> None:
        # Not the base's __init__: it asks for a process group and its values are the inner sampler's.
        self.sampler = sampler
        self.size = size

    @override
    def __iter__(self) -> Iterator[int]:
        start = self.sampler.epoch * self.size
        return (start + row for row in self.sampler)

    @override
    def __len__(self) -> int:
        return len(self.sampler)

    @override
    def set_epoch(self, epoch: int) -> None:
        self.sampler.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """The inner sampler's state, where it has one."""
        state: dict[str, Any] = self.sampler.state_dict() if hasattr(self.sampler, "state_dict") else {}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Give the inner sampler its state back."""
        if hasattr(self.sampler, "load_state_dict"):
            self.sampler.load_state_dict(state)
