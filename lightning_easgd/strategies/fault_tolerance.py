"""Workers that come, die and return: what a user says about them, and what it means in this process."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from importlib.util import find_spec
from typing import final

from lightning_easgd.transport.member_groups import GroupKind

__all__ = ["FaultTolerance", "as_fault_tolerance"]

_LIGHTHOUSE, _ID = "TORCHFT_LIGHTHOUSE", "REPLICA_GROUP_ID"
_LONGEST = 365 * 86_400.0  # seconds


@final
@dataclass(frozen=True)
class FaultTolerance:
    """How a worker finds the others, where workers may die, freeze, return or come late.

    Each worker is a launch of its own (a process, or ``torchrun``), and torchft's lighthouse keeps count of who lives.

    Args:
        lighthouse: Address of the lighthouse, as in ``"http://host:29510"``; the environment variable
            ``TORCHFT_LIGHTHOUSE`` unless given.
        replica_id: This worker's number from 0 on, which no other living worker has; the environment variable
            ``REPLICA_GROUP_ID`` unless given. A worker that is started again has the number that it had.
        group_size: In how many shares the data are cut, of which this worker samples the one of its number; None lets
            every worker sample all of them.
        min_replica_size: The center moves only where at least so many workers take part.
        quorum_timeout: Seconds, or a ``timedelta``: how long a worker stands still at an exchange for others that have
            not come to it. Then it trains on, and makes the exchange when they have come.
        process_group_timeout: Seconds, or a ``timedelta``: how long the transfer of an exchange may take before it has
            failed; through "nccl" twice that, where its kernel has to be aborted. Others that are in the middle of a
            step are waited for besides, as long as the steps of the slowest worker take.
        process_group: What the differences travel through: "gloo", with the center in host memory, which leaves the
            GPU to the steps; or "nccl", with the center on the GPU, where the network is as fast as that needs, for
            workers of one GPU without ``wire_dtype``. The same in all workers.
        restart_after_missed: A living worker that has missed so many moves of the center starts again at the center,
            its optimizer with a new state, when it finds the others; None lets it keep where it is.
        fit: Which fit of the job this is, from 1 on; None for as many as this process has made. Workers of different
            fits are not averaged: those of an earlier one are waited for, and one that begins a fit that is over for
            the others ends with an error.

    Raises:
        TypeError: If a value is of the wrong type.
        ValueError: If a value is out of its range.
    """

    lighthouse: str | None = None
    replica_id: int | None = None
    group_size: int | None = None
    min_replica_size: int = 1
    quorum_timeout: float | timedelta = 2.0
    process_group_timeout: float | timedelta = 10.0
    process_group: GroupKind = "gloo"
    restart_after_missed: int | None = None
    fit: int | None = None

    def __post_init__(self) -> None:
        if not (self.lighthouse is None or isinstance(self.lighthouse, str)):
            raise TypeError(f"FaultTolerance(lighthouse={self.lighthouse!r}): give the address, a string.")
        _check_address(self.lighthouse, f"lighthouse={self.lighthouse!r}")
        _check_int("replica_id", self.replica_id, 0)
        _check_int("group_size", self.group_size, 1)
        if self.min_replica_size is None:
            raise TypeError("FaultTolerance(min_replica_size=None): give an int; 1 lets a worker go on alone.")
        _check_int("min_replica_size", self.min_replica_size, 1)
        _check_int("restart_after_missed", self.restart_after_missed, 1)
        _check_int("fit", self.fit, 1)
        for name in ("quorum_timeout", "process_group_timeout"):
            _check_time(name, getattr(self, name))
        if self.process_group not in ("gloo", "nccl"):
            raise ValueError(f"FaultTolerance(process_group={self.process_group!r}): unknown; use 'gloo' or 'nccl'.")
        if self.replica_id is not None and self.group_size is not None:
            _check_share(self.replica_id, self.group_size, f"replica_id={self.replica_id}")

    def resolved(self, environment: Mapping[str, str] = os.environ) -> "FaultTolerance":
        """The same with what the environment says; there is an address and a number then.

        Raises:
            ModuleNotFoundError: If torchft is not installed.
            ValueError: If something is missing, or the environment says what cannot be.
        """
        if find_spec("torchft") is None:
            raise ModuleNotFoundError(
                "FaultTolerance needs torchft, which is not installed; pip install 'lightning_easgd[elastic]'."
            )
        lighthouse, replica_id = self.lighthouse, self.replica_id
        if lighthouse is None:
            lighthouse = environment.get(_LIGHTHOUSE)
            if not lighthouse:
                raise ValueError(
                    f"FaultTolerance(lighthouse=None): there is no address, and {_LIGHTHOUSE} is not set; start"
                    " torchft_lighthouse, and give its address, as in 'http://host:29510'."
                )
            _check_address(lighthouse, f"lighthouse=None) with {_LIGHTHOUSE}={lighthouse!r}", closed=True)
        if replica_id is None:
            text = environment.get(_ID, "")
            if not text.isdecimal():
                given = f"is {text!r}" if text else "is not set"
                raise ValueError(
                    f"FaultTolerance(replica_id=None): {_ID} {given}; give each worker a number of its own, from 0 on."
                )
            replica_id = int(text)
            if self.group_size is not None:
                _check_share(replica_id, self.group_size, f"replica_id=None) with {_ID}={text}", closed=True)
        return replace(
            self,
            lighthouse=lighthouse.rstrip("/"),
            replica_id=replica_id,
            quorum_timeout=_seconds(self.quorum_timeout),
            process_group_timeout=_seconds(self.process_group_timeout),
        )


def as_fault_tolerance(strategy: str, given: object) -> FaultTolerance | None:
    """What a strategy's argument ``fault_tolerance`` means.

    Raises:
        TypeError: If it is neither bool, None nor a :class:`FaultTolerance`.
    """
    if given is None or given is False:
        return None
    if given is True:
        return FaultTolerance()
    if isinstance(given, FaultTolerance):
        return given
    raise TypeError(
        f"{strategy}(fault_tolerance={given!r}): give True, or a lightning_easgd.FaultTolerance; None for a fixed"
        " number of workers."
    )


def _check_address(address: str | None, given: str, *, closed: bool = False) -> None:
    if address is not None and not address.startswith(("http://", "https://")):
        end = "" if closed else ")"
        raise ValueError(
            f"FaultTolerance({given}{end}: an address is 'http://host:port'; torchft_lighthouse prints it."
        )


def _check_share(replica_id: int, group_size: int, given: str, *, closed: bool = False) -> None:
    if replica_id >= group_size:
        where = f"{given}, group_size={group_size}" + ("" if closed else ")")
        raise ValueError(
            f"FaultTolerance({where}: the data are cut in shares 0 to {group_size - 1}; raise group_size, or leave it"
            " out for workers that sample all data."
        )


def _check_int(name: str, value: object, least: int) -> None:
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"FaultTolerance({name}={value!r}): give an int.")
    if value < least:
        raise ValueError(f"FaultTolerance({name}={value}): it is at least {least}.")


def _check_time(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float | timedelta):
        raise TypeError(f"FaultTolerance({name}={value!r}): give seconds, or a datetime.timedelta.")
    if not 0 < _seconds(value) <= _LONGEST:
        raise ValueError(f"FaultTolerance({name}={value}): a time to wait is positive, and a year at most.")


def _seconds(value: float | timedelta) -> float:
    return value.total_seconds() if isinstance(value, timedelta) else float(value)
