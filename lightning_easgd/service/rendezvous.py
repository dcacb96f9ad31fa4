"""How the ranks tell each other where things are, over the store."""

import json
import time
from typing import Any, final

from torch.distributed.distributed_c10d import Store

from lightning_easgd.service.errors import CenterTimeoutError

__all__ = ["Rendezvous"]

_PAUSE = 0.01


@final
class Rendezvous:
    """All ranks hand in a value each, and get all values.

    Args:
        store: The store, for the use of this thread alone.
        rank: This process's rank.
        world_size: The number of ranks.
        timeout: Seconds to wait for the last rank.
    """

    def __init__(self, store: Store, rank: int, world_size: int, timeout: float) -> None:
        self._store = store
        self._rank = rank
        self._world_size = world_size
        self._timeout = timeout

    def gather(self, name: str, value: Any) -> list[Any]:
        """Hand in a value that JSON can hold, and return those of all ranks.

        Raises:
            CenterTimeoutError: If a rank does not come; it is named.
        """
        keys = [f"{name}/{rank}" for rank in range(self._world_size)]
        self._store.set(keys[self._rank], json.dumps(value))
        missing = list(range(self._world_size))
        deadline = time.monotonic() + self._timeout
        while not self._store.check([keys[rank] for rank in missing]):
            missing = [rank for rank in missing if not self._store.check([keys[rank]])]
            if missing and time.monotonic() > deadline:
                raise CenterTimeoutError(
                    f"open_center(timeout={self._timeout:g}): ranks {missing} have not come to {name!r}; every rank"
                    " must open the center."
                )
            time.sleep(_PAUSE)
        return [json.loads(answer) for answer in self._store.multi_get(keys)]
