"""The arguments of ``DDPStrategy`` that belong to its DDP wrapper: one list for every strategy of this package."""

import inspect
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import cache, wraps
from typing import Any, ParamSpec, TypedDict, TypeVar

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState
from torch.nn.parallel import DistributedDataParallel

__all__ = [
    "REFUSED_INSIDE",
    "REFUSED_WITHOUT",
    "DDPArguments",
    "check_ddp_arguments",
    "known_ddp_arguments",
    "names_its_class",
    "takes_ddp_arguments",
    "warn_without_effect",
]

_P = ParamSpec("_P")
_T = TypeVar("_T")

REFUSED_WITHOUT = dict.fromkeys(
    ("ddp_comm_state", "ddp_comm_hook", "ddp_comm_wrapper", "model_averaging_period"),
    "this argument changes how DDP reduces gradients, and here gradients are not reduced; remove it, or use"
    " strategy='ddp'.",
)
"""The arguments that are refused where nothing is wrapped, and why."""

REFUSED_INSIDE = {
    "model_averaging_period": "workers are averaged every tau steps; remove it.",
    **dict.fromkeys(
        ("process_group", "device_mesh"), "the strategy makes the group of each worker's ranks; remove it."
    ),
}
"""Those that are refused where DDP wraps the ranks of a worker, and why."""

_SEE = "see its docstring for the arguments it takes."
_OF_OTHERS = {
    "devices_per_worker": "it is EASGDStrategy(mode='sync') that has workers of several devices with DDP inside.",
}
_GIVEN_BY_LIGHTNING = ("self", "module", "device_ids")


class DDPArguments(TypedDict, total=False):
    """What ``DDPStrategy`` takes beside what every strategy does, in the torch releases that are supported."""

    ddp_comm_state: object | None
    ddp_comm_hook: Callable[..., Any] | None
    ddp_comm_wrapper: Callable[..., Any] | None
    model_averaging_period: int | None
    find_unused_parameters: bool | None
    static_graph: bool | None
    gradient_as_bucket_view: bool | None
    broadcast_buffers: bool | None
    forward_sync_buffers: bool | None
    init_sync: bool | None
    bucket_cap_mb: int | None
    bucket_cap_mb_list: list[int] | None
    batched_grad_copy: bool | None
    check_reduction: bool | None
    skip_all_reduce_unused_params: bool | None
    delay_all_reduce_named_params: Any
    param_to_hook_all_reduce: Any
    mixed_precision: Any
    dim: int | None
    output_device: Any
    process_group: Any
    device_mesh: Any


def takes_ddp_arguments(init: Callable[_P, _T]) -> Callable[_P, _T]:
    """Decorate a constructor that ends in ``**ddp_arguments``: its signature names them all, with None for a default.

    ``inspect.signature``, and so jsonargparse and LightningCLI, see what the constructor takes.
    """
    signature = inspect.signature(init)
    own = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
    theirs = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in known_ddp_arguments().items()
    ]
    init.__signature__ = signature.replace(parameters=[*own, *theirs])  # type: ignore[attr-defined]
    return names_its_class(init)


def names_its_class(init: Callable[_P, _T]) -> Callable[_P, _T]:
    """Decorate a constructor: a call that does not fit it is an error of the class that was called.

    Python's own error names the class whose constructor it is: a user's class is another one.
    """
    signature = inspect.signature(init)

    @wraps(init)
    def named(*arguments: _P.args, **keywords: _P.kwargs) -> _T:
        cls = type(arguments[0])
        for name, value in keywords.items():
            if name not in signature.parameters:
                raise TypeError(_unknown(cls, name, value))
        try:
            signature.bind(*arguments, **keywords)
        except TypeError as error:
            raise TypeError(f"{cls.__name__}(...): {error}; {_SEE}") from None
        return init(*arguments, **keywords)

    return named


@cache
def known_ddp_arguments() -> dict[str, Any]:
    """Name → type; of this torch's wrapper also what is newer than the list above."""
    wrapper = inspect.signature(DistributedDataParallel.__init__).parameters
    newer = {name: Any for name in wrapper if name not in _GIVEN_BY_LIGHTNING}
    return {**newer, **DDPArguments.__annotations__}


def check_ddp_arguments(
    cls: type, arguments: Mapping[str, Any], refused: Mapping[str, str] = REFUSED_WITHOUT
) -> dict[str, Any]:
    """The arguments of the DDP wrapper among these, of which None counts as not given.

    Args:
        cls: The strategy.
        arguments: What it was given.
        refused: The arguments that it does not take, and why.

    Raises:
        TypeError: If an argument is refused, or what it is given.
    """
    strategy, given = cls.__name__, {}
    for name, value in arguments.items():
        if value is None:
            continue
        if name in refused:
            raise TypeError(f"{strategy}({name}={value!r}): {refused[name]}")
        if isinstance(value, PostLocalSGDState):
            raise TypeError(
                f"{strategy}({name}=PostLocalSGDState(...)): after its first steps it reduces gradients over the ranks"
                " of a node, of whichever worker they are, or not at all, and nothing brings the ranks of a worker"
                " together again; remove it: workers of one rank (devices_per_worker=1) are averaged every tau steps."
            )
        given[name] = value
    return given


def _unknown(cls: type, name: str, value: object) -> str:
    if name in _OF_OTHERS:
        return f"{cls.__name__}({name}={value!r}): {_OF_OTHERS[name]}"
    known = get_close_matches(name, inspect.signature(cls).parameters, n=1)
    return f"{cls.__name__}({name}={value!r}): unknown argument; {f'did you mean {known[0]}?' if known else _SEE}"


def warn_without_effect(strategy: str, arguments: Mapping[str, Any]) -> None:
    """Warn once, on rank 0, of all arguments of the DDP wrapper that have no effect."""
    if arguments:
        given = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
        rank_zero_warn(
            f"{strategy}({given}) has no effect: that is for the DDP wrapper, which this strategy does not use;"
            " remove it."
        )
