"""A training set that the workers share out among themselves while they train."""

import time
from collections.abc import Iterator
from datetime import timedelta
from itertools import count
from typing import Any, final

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.distributed_c10d import _get_default_store
from torch.utils.data import Dataset, DistributedSampler
from typing_extensions import override

from lightning_easgd.transport.errors import CenterTimeoutError
from lightning_easgd.transport.store_client import StoreClient, store_server

__all__ = ["DynamicShare"]

_PAUSE = 0.01  # seconds between two looks at whether the others have come
_instances = count()


@final
class DynamicShare(DistributedSampler[Any]):
    """Deals an epoch's samples out in chunks, to whichever worker asks next.

    In each epoch all workers see one common shuffle of the data set, cut into chunks; each chunk goes to one worker,
    and each sample is drawn once. A worker that is slow draws fewer chunks, makes fewer steps, and nobody waits for
    it at the end of the epoch. The first chunk of each worker is set aside for it, so that none goes through an epoch
    without data. How many batches a worker will get is not known before, so the sampler has no length.
    (The loaders of the EASGD paper hand out chunks of 512 CIFAR or 64 ImageNet images in this way.) Here a worker is
    one rank: the strategies refuse it for workers of several, which make their steps together.

    It is a ``DistributedSampler``, which Lightning neither replaces nor forgets to give the epoch to. All ranks make
    their samplers in the same order.

    Args:
        dataset: The training set.
        chunk: Samples of one chunk, fewer if there would be less than one for each worker; a multiple of the batch
            size keeps batches whole.
        seed: Of the shuffles.
        timeout: How long ranks wait for each other when they resume, and for the store that deals the chunks out.

    Raises:
        ValueError: If ``chunk`` < 1.
    """

    def __init__(
        self, dataset: Dataset[Any], *, chunk: int = 512, seed: int = 0, timeout: timedelta = timedelta(minutes=5)
    ) -> None:
        if chunk < 1:
            raise ValueError(f"DynamicShare(chunk={chunk}): a chunk has at least 1 sample; 512 is the default.")
        super().__init__(dataset, num_replicas=1, rank=0, shuffle=True, seed=seed)
        self.chunk = chunk
        self._samples = self.total_size
        self._timeout = timeout
        self._number = next(_instances)
        self._store: StoreClient | None = None
        self._passes = 0  # the pool of a pass is new, also if an epoch is gone through twice
        self._drawn: list[int] = []
        self._given = 0
        self._resumed = False

    @override
    def __len__(self) -> int:
        # DataLoader and Lightning then treat the data as of unknown length.
        raise TypeError("DynamicShare has no length: how much a worker draws shows while it trains.")

    @override
    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(self._samples, generator=torch.Generator().manual_seed(self.seed + self.epoch)).tolist()
        rank, workers = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        if len(order) < workers:
            raise ValueError(
                f"DynamicShare(dataset of {len(order)} samples) with {workers} workers: each worker needs at least one;"
                " use fewer workers."
            )
        size = min(self.chunk, len(order) // workers)
        parts = [order[start : start + size] for start in range(0, len(order), size)]
        pool = self._open_store().under(f"{self._passes}")
        self._passes += 1
        if self._resumed:
            self._resumed = False
            free = self._free_chunks(pool, len(parts))
            if self._drawn:
                yield from self._give(parts[self._drawn[-1]][self._given :])
        else:
            free = list(range(workers, len(parts)))
            self._drawn = [rank]
            self._given = 0
            yield from self._give(parts[rank])
        while (ticket := pool.add("next", 1) - 1) < len(free):
            self._drawn.append(free[ticket])
            self._given = 0
            yield from self._give(parts[free[ticket]])

    def state_dict(self) -> dict[str, Any]:
        """What this rank has drawn in the current epoch; each rank saves and loads its own.

        Samples that a DataLoader has fetched ahead count as given.
        """
        return {"epoch": self.epoch, "drawn": list(self._drawn), "given": self._given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on in the middle of an epoch, on as many ranks as before: what was given is not given again."""
        self.epoch = state["epoch"]
        self._drawn = list(state["drawn"])
        self._given = state["given"]
        self._resumed = True

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_store": None}

    def _give(self, samples: list[int]) -> Iterator[int]:
        for sample in samples:
            self._given += 1
            yield sample

    def _free_chunks(self, pool: StoreClient, chunks: int) -> list[int]:
        """The chunks that no rank had drawn."""
        if not dist.is_initialized():
            return [chunk for chunk in range(chunks) if chunk not in self._drawn]
        pool.set(f"drawn/{dist.get_rank()}", " ".join(map(str, self._drawn)))
        keys = [f"drawn/{rank}" for rank in range(dist.get_world_size())]
        deadline = time.monotonic() + self._timeout.total_seconds()
        while not pool.check(keys):
            if time.monotonic() > deadline:
                missing = [rank for rank, key in enumerate(keys) if not pool.check([key])]
                raise CenterTimeoutError(
                    f"DynamicShare(timeout={self._timeout}): ranks {missing} have not come to resume the epoch;"
                    " look for the first error among the ranks."
                )
            time.sleep(_PAUSE)
        taken = {int(chunk) for key in keys for chunk in pool.get(key).split()}
        return [chunk for chunk in range(chunks) if chunk not in taken]

    def _open_store(self) -> StoreClient:
        if self._store is None:
            store = _get_default_store() if dist.is_initialized() else HashStore()
            client = StoreClient(store, self._timeout.total_seconds(), server=store_server())
            self._store = client.under(f"easgd-share/{self._number}")
        return self._store
