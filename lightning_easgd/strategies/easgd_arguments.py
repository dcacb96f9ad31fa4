"""What is wrong with the arguments of an EASGD strategy: each is refused before any process starts."""

import pickle

from lightning_easgd.method.rates import check_number
from lightning_easgd.method.rule_check import check_rule
from lightning_easgd.method.rules import CenterRule
from lightning_easgd.strategies.fault_tolerance import FaultTolerance

__all__ = [
    "check_center_device",
    "check_center_rule",
    "check_elastic",
    "check_mode",
    "check_momentum",
    "check_outer",
    "check_pickled",
    "check_pull",
    "check_wire_dtype",
    "check_worker",
]


def check_momentum(strategy: str, momentum: float | None) -> None:
    """Refuse what is no Nesterov momentum."""
    check_number(strategy, "momentum", momentum)
    if momentum is not None and not 0 < momentum < 1:
        raise ValueError(
            f"{strategy}(momentum={momentum}): Nesterov momentum lies in (0, 1); leave it None for plain EASGD."
        )


def check_center_rule(strategy: str, center_rule: object) -> None:
    """Refuse what is no rule, or one that other ranks would take for another."""
    if not (center_rule is None or isinstance(center_rule, CenterRule)):
        raise TypeError(
            f"{strategy}(center_rule={center_rule!r}): this is no rule; derive a class from"
            " lightning_easgd.method.rules.CenterRule, and give an instance."
        )
    if center_rule is not None:
        check_rule(strategy, center_rule)


def check_pickled(strategy: str, start_method: str, **arguments: object) -> None:
    """Refuse what ranks that are started with an interpreter of their own cannot be given."""
    for name, value in arguments.items() if start_method in ("spawn", "forkserver") else ():
        try:
            pickle.dumps(value)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(
                f"{strategy}({name}={value!r}, start_method={start_method!r}): the ranks get it pickled, and it cannot"
                f" be ({error}); define its class at the top of a module and let it hold numbers, or use"
                " start_method='popen'."
            ) from error


def check_outer(strategy: str, momentum: object, nesterov: object, center_rule: CenterRule | None) -> None:
    """Refuse a momentum of the center that is none, or that another rule would not know of."""
    check_number(strategy, "outer_momentum", momentum)
    if not (momentum is None or (isinstance(momentum, int | float) and 0 <= momentum < 1)):
        raise ValueError(
            f"{strategy}(outer_momentum={momentum}): the center's momentum lies in [0, 1); leave it None for none."
        )
    if not isinstance(nesterov, bool):
        raise TypeError(f"{strategy}(outer_nesterov={nesterov!r}): this is no bool; use True or False.")
    if nesterov and momentum is None:
        raise ValueError(
            f"{strategy}(outer_nesterov=True): there is no momentum to look ahead with; give outer_momentum, 0.9 in"
            " DiLoCo."
        )
    if momentum is not None and center_rule is not None:
        raise ValueError(
            f"{strategy}(outer_momentum={momentum}, center_rule={center_rule!r}): each says how the center moves; give"
            " one of them."
        )


def check_pull(strategy: str, pull_to: object, delay: object, mode: str, tau: int) -> None:
    """Refuse an unknown center to be pulled to, and a delay that there is nothing to wait in."""
    if pull_to not in ("old", "new"):
        raise ValueError(
            f"{strategy}(pull_to={pull_to!r}): unknown center; use 'old' for that of before the exchange, or 'new' for"
            " that of after it."
        )
    if isinstance(delay, bool) or not isinstance(delay, int):
        raise TypeError(f"{strategy}(delay={delay!r}): this is no number of steps; give an int.")
    if not 0 <= delay < tau:
        raise ValueError(
            f"{strategy}(delay={delay}, tau={tau}): an exchange is over before the next one begins, so that a delay"
            " lies in 0, …, tau - 1."
        )
    if delay and mode == "sync" and pull_to == "old":
        raise ValueError(
            f"{strategy}(delay={delay}, pull_to='old'): every synchronous worker holds the old center, and its pull"
            " waits for nothing; use pull_to='new', or leave delay out."
        )


def check_mode(strategy: str, mode: object, order: str, on_worker_loss: str) -> None:
    """Refuse an unknown mode, and what asynchronous workers alone can have."""
    if mode not in ("sync", "async"):
        raise ValueError(f"{strategy}(mode={mode!r}): unknown mode; use 'sync' or 'async'.")
    if mode == "sync" and order != "free":
        raise ValueError(
            f"{strategy}(order={order!r}, mode='sync'): synchronous workers exchange all at once; use mode='async'."
        )
    if mode == "sync" and on_worker_loss != "fail":
        raise ValueError(
            f"{strategy}(on_worker_loss={on_worker_loss!r}, mode='sync'): an all-reduce needs every worker; use"
            " mode='async'."
        )


def check_worker(strategy: str, devices_per_worker: object, mode: str) -> None:
    """Refuse workers of several ranks with a served center."""
    if devices_per_worker != 1 and mode == "async":
        raise ValueError(
            f"{strategy}(devices_per_worker={devices_per_worker!r}, mode='async'): the served center answers each rank"
            " on its own clock, and the ranks of one worker have to get the same answer; use mode='sync', or"
            " devices_per_worker=1."
        )


def check_elastic(strategy: str, mode: str, may: bool) -> None:
    """Refuse what workers that come and go cannot have."""
    if not may:
        raise ValueError(
            f"{strategy}(fault_tolerance=...): Fabric's workers are a fixed number; leave it out, or use a Trainer."
        )
    if mode == "async":
        raise ValueError(
            f"{strategy}(mode='async', fault_tolerance=...): a served center goes with the ranks that hold it; use"
            " mode='sync'."
        )


def check_nccl(strategy: str, settings: FaultTolerance, center_device: str | None, wire_dtype: str | None) -> None:
    """Refuse what does not go through NCCL where workers come and go."""
    for name, value, why in (
        ("center_device", center_device, "NCCL adds up what is on the GPU, and the center with it"),
        ("wire_dtype", wire_dtype, "compressed messages through NCCL have not been shown to work"),
    ):
        if settings.process_group == "nccl" and value is not None:
            raise ValueError(
                f"{strategy}({name}={value!r}, fault_tolerance=FaultTolerance(process_group='nccl')): {why}; leave"
                f" {name} out, or use 'gloo'."
            )


def check_wire_dtype(strategy: str, wire_dtype: object) -> None:
    """Refuse an unknown dtype of messages."""
    if wire_dtype not in (None, "bfloat16", "int8"):
        raise ValueError(
            f"{strategy}(wire_dtype={wire_dtype!r}): unknown; use 'bfloat16' or 'int8', or None to send the"
            " differences as they are."
        )


def check_center_device(strategy: str, center_device: object, mode: str) -> None:
    """Refuse an unknown place, and any for a served center."""
    if center_device not in (None, "cpu"):
        raise ValueError(
            f"{strategy}(center_device={center_device!r}): unknown place; use 'cpu', or None for where the"
            " parameters are."
        )
    if center_device is not None and mode == "async":
        raise ValueError(
            f"{strategy}(center_device={center_device!r}, mode='async'): a served center is in host memory anyway;"
            " leave it out."
        )
