"""What torchft's lighthouse has heard of the workers of a job, and beside whom this one cannot be."""

import math
import re
import time
import urllib.request
import warnings
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from http.client import HTTPException
from typing import Final, final

from lightning_easgd.transport.channel import ExchangeError
from lightning_easgd.transport.member_groups import GroupKind

__all__ = ["CONNECTING", "DIRECT", "Heard", "Lighthouse"]

CONNECTING = timedelta(seconds=10)  # to the lighthouse, at the start
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Opens what other workers serve, which the proxy of the environment need not reach."""
_ALIVE = 0.5  # seconds since the last heartbeat; there are ten a second
_PERHAPS_ALIVE = 2.0  # where a heartbeat may be late, and to be wrong is worse than to wait
_LOOKS = 4 * _ALIVE  # seconds
_SOON = 10.0  # seconds in which workers that go on together end a fit
_KINDS: Final[dict[GroupKind, str]] = {"gloo": "", "nccl": "n"}


@final
@dataclass(frozen=True)
class Heard:
    """A worker that the lighthouse has heard of, or will.

    Attributes:
        replica_id: Its number.
        ranks: How many it has.
        fit: Which fit of the job it is in.
        kind: What it exchanges through.
        launch: The name of this launch of it.
        age: Seconds since its last sign of life.
    """

    replica_id: int
    ranks: int = 1
    fit: int = 1
    kind: GroupKind = "gloo"
    launch: str = ""
    age: float = math.inf

    @property
    def name(self) -> str:
        """What it is called there, where those of one size, fit and kind are put in the order of their numbers."""
        size = "" if self.ranks == 1 else f"{self.ranks}x"
        return f"{size}{self.replica_id:06d}{'' if self.fit == 1 else f'f{self.fit}'}{_KINDS[self.kind]}"

    @classmethod
    def all_on(cls, page: str) -> list["Heard"]:
        """All that a page of the lighthouse names, with their ages."""
        found = re.findall(r"\b(?:(\d+)x)?(\d{6,})(?:f(\d+))?(n?):([0-9a-f-]+): seen ([0-9.]+)s ago", page)
        kinds: dict[str, GroupKind] = {letter: kind for kind, letter in _KINDS.items()}
        return [
            cls(int(number), int(ranks or 1), int(fit or 1), kinds[letter], launch, float(age))
            for ranks, number, fit, letter, launch, age in found
        ]

    @property
    def lives(self) -> bool:
        """Whether it is alive."""
        return self.age < _ALIVE

    @property
    def may_live(self) -> bool:
        """Whether it may be alive, with a heartbeat that is late."""
        return self.age < _PERHAPS_ALIVE


@final
class Lighthouse:
    """A job's lighthouse, as one worker sees it.

    Args:
        address: Its address.
        own: The worker.
        strategy: The strategy's name, for errors.

    Attributes:
        address: As given.
        own: As given.
    """

    def __init__(self, address: str, own: Heard, strategy: str) -> None:
        self.address = address
        self.own = own
        self._strategy = strategy

    def heard(self) -> list[Heard]:
        """The workers that it has heard of; none if it is away."""
        with suppress(OSError, HTTPException):
            return Heard.all_on(self._page())
        return []

    def _page(self) -> str:
        with DIRECT.open(f"{self.address}/status", timeout=2) as answer:
            return str(answer.read().decode(errors="replace"))

    def living_beside(self, numbers: Collection[int]) -> set[int]:
        """The numbers of those of this worker's size and fit that may live, but for these."""
        alike = [each for each in self.heard() if (each.ranks, each.fit) == (self.own.ranks, self.own.fit)]
        return {each.replica_id for each in alike if each.may_live}.difference(numbers)

    def check(self, patience: float) -> None:
        """Look whether it is there, and wait until no worker is in an earlier fit than this one.

        What belongs to two fits is not averaged.

        Args:
            patience: Seconds.

        Raises:
            ExchangeError: If it is not there, they take longer, or a worker is alive that this one cannot be beside.
        """
        from torchft.coordination import LighthouseClient  # noqa: PLC0415 - an extra

        try:
            LighthouseClient(self.address, connect_timeout=CONNECTING)
            self._check_page()  # the client is content with anything that listens, and would wait for it
        except (RuntimeError, OSError, HTTPException) as error:
            raise ExchangeError(
                f"{self._strategy}: there is no lighthouse at {self.address}; start torchft_lighthouse there, or"
                f" correct FaultTolerance(lighthouse=...) or TORCHFT_LIGHTHOUSE. Cause: {error}"
            ) from None
        earlier = self._who_stays(self._is_earlier, min(patience, _SOON))
        if earlier is not None and patience > _SOON:
            warnings.warn(
                f"{self._strategy}(timeout={patience:.0f} s): this is fit {self.own.fit} of the job, and waits for the"
                f" worker with replica_id={earlier.replica_id}, which is still in fit {earlier.fit}; where it tries one"
                " again that an error has ended, give FaultTolerance(fit=...) the number of that one.",
                RuntimeWarning,
                stacklevel=2,
            )
            earlier = self._who_stays(self._is_earlier, patience - _SOON)
        if earlier is not None:
            raise ExchangeError(
                f"{self._strategy}(timeout={patience:.0f} s): this is fit {self.own.fit} of the job, and the"
                f" worker with replica_id={earlier.replica_id} is still in fit {earlier.fit}; wait longer, or"
                " give FaultTolerance(fit=...) of all workers the same number."
            )
        self.refuse_others("")

    def _check_page(self) -> None:
        deadline = time.monotonic() + CONNECTING.total_seconds()
        while True:
            try:
                page = self._page()
                break
            except (OSError, HTTPException):  # a lighthouse may be busy
                if time.monotonic() > deadline:
                    raise
            time.sleep(_ALIVE / 5)
        if "quorum" not in page:
            raise RuntimeError("what answers there is another server")

    def refuse_others(self, own: str) -> None:
        """Raise if another worker of this number is alive, one that has come before this one; or one of another size.

        Args:
            own: The name of this launch; empty if the lighthouse does not know it.

        Raises:
            ExchangeError: If it is so.
        """
        other = self._who_stays(lambda other: self._is_refused(other, own), _LOOKS)
        if other is not None:
            raise ExchangeError(f"{self._strategy}: {self._why_refused(other)}")

    def _who_stays(self, is_meant: Callable[[Heard], bool], seconds: float) -> Heard | None:
        """A living worker of which something holds for so long; None when there is none."""
        deadline = time.monotonic() + seconds
        while others := [each for each in self.heard() if each.lives and is_meant(each)]:
            if time.monotonic() > deadline:
                return others[0]
            time.sleep(_ALIVE / 5)
        return None

    def _is_earlier(self, other: Heard) -> bool:
        return other.fit < self.own.fit

    def _is_refused(self, other: Heard, own: str) -> bool:
        is_earlier = not (own and other.launch >= own)
        is_alike = (other.ranks, other.kind) == (self.own.ranks, self.own.kind) and other.fit <= self.own.fit
        return is_earlier and (not is_alike or other.replica_id == self.own.replica_id)

    def _why_refused(self, other: Heard) -> str:
        if other.fit > self.own.fit:
            return (
                f"the worker with replica_id={other.replica_id} is in fit {other.fit} of the job, and this one begins"
                f" fit {self.own.fit}, which is over; leave it out, and tell the next one by"
                f" FaultTolerance(fit={other.fit})."
            )
        if other.ranks != self.own.ranks:
            return (
                f"the worker with replica_id={other.replica_id} has {other.ranks} ranks, and this one"
                f" {self.own.ranks}; give all workers the same number of devices."
            )
        if other.kind != self.own.kind:
            return (
                f"the worker with replica_id={other.replica_id} has FaultTolerance(process_group={other.kind!r}), and"
                f" this one {self.own.kind!r}; give all the same."
            )
        return (
            f"a worker with replica_id={self.own.replica_id} is alive already ({other.launch}); give each worker a"
            " number of its own, by FaultTolerance(replica_id=...) or REPLICA_GROUP_ID."
        )
