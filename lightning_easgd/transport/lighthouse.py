"""What torchft's lighthouse has heard of the workers of a job, and beside whom this one cannot be."""

import re
import time
import urllib.request
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import final

from lightning_easgd.transport.channel import ExchangeError

__all__ = ["CONNECTING", "DIRECT", "Heard", "Lighthouse"]

CONNECTING = timedelta(seconds=10)  # to the lighthouse, at the start
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Opens what other workers serve, which the proxy of the environment need not reach."""
_ALIVE = 0.5  # seconds since the last heartbeat; there are ten a second
_PERHAPS_ALIVE = 2.0  # where a heartbeat may be late, and to be wrong is worse than to wait
_LOOKS = 4 * _ALIVE  # seconds


@final
@dataclass(frozen=True)
class Heard:
    """A worker that the lighthouse has heard of.

    Attributes:
        replica_id: Its number.
        ranks: How many it has.
        fit: Which fit of the job it is in.
        name: Of this launch of it.
        age: Seconds since its last sign of life.
    """

    replica_id: int
    ranks: int
    fit: int
    name: str
    age: float

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
        replica_id: The worker's number.
        ranks: How many it has.
        fit: Which fit of the job it is in.
        strategy: The strategy's name, for errors.

    Attributes:
        address: As given.
        name: What the worker is to be called there.
    """

    def __init__(self, address: str, replica_id: int, ranks: int, fit: int, strategy: str) -> None:
        self.address = address
        self._replica_id, self._ranks, self._fit = replica_id, ranks, fit
        self._strategy = strategy
        # Those of one size and fit are put in the order of their numbers by it.
        self.name = ("" if ranks == 1 else f"{ranks}x") + f"{replica_id:06d}" + ("" if fit == 1 else f"f{fit}")

    def heard(self) -> list[Heard]:
        """The workers that it has heard of; none if it is away."""
        page = ""
        with suppress(OSError), DIRECT.open(f"{self.address}/status", timeout=2) as answer:
            page = answer.read().decode()
        found = re.findall(r"\b(?:(\d+)x)?(\d{6,})(?:f(\d+))?:([0-9a-f-]+): seen ([0-9.]+)s ago", page)
        return [
            Heard(int(number), int(ranks or 1), int(fit or 1), name, float(age))
            for ranks, number, fit, name, age in found
        ]

    def living_beside(self, numbers: Collection[int]) -> set[int]:
        """The numbers of those of this worker's size and fit that may live, but for these."""
        alike = [each for each in self.heard() if (each.ranks, each.fit) == (self._ranks, self._fit)]
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
        except RuntimeError as error:
            raise ExchangeError(
                f"{self._strategy}: there is no lighthouse at {self.address}; start torchft_lighthouse there, or"
                f" correct FaultTolerance(lighthouse=...) or TORCHFT_LIGHTHOUSE. Cause: {error}"
            ) from None
        earlier = self._who_stays(lambda other: other.fit < self._fit, patience)
        if earlier is not None:
            raise ExchangeError(
                f"{self._strategy}(timeout={patience:.0f} s): this is fit {self._fit} of the job, and the"
                f" worker with replica_id={earlier.replica_id} is still in fit {earlier.fit}; wait longer, or"
                " give FaultTolerance(fit=...) of all workers the same number."
            )
        self.refuse_others("")

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

    def _is_refused(self, other: Heard, own: str) -> bool:
        is_earlier = not (own and other.name >= own)
        is_alike = other.ranks == self._ranks and other.fit <= self._fit
        return is_earlier and (not is_alike or other.replica_id == self._replica_id)

    def _why_refused(self, other: Heard) -> str:
        if other.fit > self._fit:
            return (
                f"the worker with replica_id={other.replica_id} is in fit {other.fit} of the job, and this one begins"
                f" fit {self._fit}, which is over; leave it out, and tell the next one by"
                f" FaultTolerance(fit={other.fit})."
            )
        if other.ranks != self._ranks:
            return (
                f"the worker with replica_id={other.replica_id} has {other.ranks} ranks, and this one"
                f" {self._ranks}; give all workers the same number of devices."
            )
        return (
            f"a worker with replica_id={self._replica_id} is alive already ({other.name}); give each worker a number of"
            " its own, by FaultTolerance(replica_id=...) or REPLICA_GROUP_ID."
        )
