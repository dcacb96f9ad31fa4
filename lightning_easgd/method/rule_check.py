"""What a rule of somebody's own must do, tried before any process starts."""

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_easgd.method.rules import CenterRule

__all__ = ["check_rule"]

_CENTER = torch.tensor([0.5, -1.0, 2.0, 0.25, -0.75], dtype=torch.float64)
_DIFFERENCE = torch.tensor([1.0, 0.5, -0.25, -2.0, 0.125], dtype=torch.float64)
_RATE = 0.25
_MOVES = 3


def check_rule(owner: str, rule: CenterRule) -> None:
    """Refuse what is no rule; it is tried on a few numbers, as what it does wrong would show in wrong numbers alone.

    Args:
        owner: The class of which it is an argument.
        rule: The rule.

    Raises:
        TypeError: If ``names`` are no names, or a method returns what it should not.
        ValueError: If two of its stores have one name, its ``repr`` is not the same in every process, or it does not
            do what :class:`CenterRule` says.
    """
    what = f"{owner}(center_rule={rule!r})"
    names: object = rule.names
    in_order = isinstance(names, Sequence) and not isinstance(names, str)  # a set's order differs from rank to rank
    if not in_order or not rule.names or not all(isinstance(name, str) for name in rule.names):
        raise TypeError(f"{what}: names={names!r} are no names of stores; give a tuple, ('center',) for one.")
    if len(set(rule.names)) < len(rule.names):
        raise ValueError(
            f"{what}: two of its stores have one name ({', '.join(rule.names)}), and checkpoints tell them apart by it;"
            " give each a name of its own."
        )
    if not isinstance(rule.shown, int) or rule.shown not in range(rule.stores):
        raise ValueError(f"{what}: shown={rule.shown!r} is none of its {rule.stores} stores; they count from 0.")
    if " at 0x" in repr(rule):
        raise ValueError(
            f"{what}: ranks compare rules by what they show, and an address differs from rank to rank; give the rule"
            " numbers and not functions, or the class in question a __repr__."
        )
    _try_out(what, rule)


@torch.no_grad()
def _try_out(what: str, rule: CenterRule) -> None:
    whole_vector, in_parts = [slice(None)], [slice(0, 2), slice(2, None)]
    try:
        stores = _initial(rule, whole_vector)
        starts_again, starts_in_parts = _initial(rule, whole_vector), _initial(rule, in_parts)
        whole, again = _moved(rule, stores, whole_vector), _moved(rule, stores, whole_vector)
        parts = _moved(rule, stores, in_parts)
        late = _moved(rule, stores, whole_vector, version=_MOVES)
    except Exception as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        says_all = isinstance(error, ValueError | TypeError | IndexError | RuntimeError)
        raise kind(f"{what}, tried on {len(_CENTER)} numbers: {error if says_all else repr(error)}.") from error
    for holds, problem in (
        (
            all(map(_same, stores, starts_again)),
            "initial_stores, called twice on the same numbers, makes different ones, so that the ranks' centers would"
            " part; let it draw nothing at random",
        ),
        (
            all(map(_same, stores, starts_in_parts)),
            "initial_stores begins a part of a store by what is in other parts; parts are cut otherwise by each"
            " transport, so that a number may depend on the center at its own place alone",
        ),
        (
            all(bool(whole[store].isfinite().all()) for store in (0, rule.shown)),
            "of finite numbers it makes some that are not; look at its arguments",
        ),
        (
            all(map(_same, whole, again)),
            "tried twice on the same numbers it makes different ones, so that the ranks' centers would part; what a"
            " rule remembers lies in its stores (names, initial_stores), and nothing is drawn at random",
        ),
        (
            all(map(_same, whole, parts)),
            "it moves a part of the center by what is in other parts; parts are cut otherwise by each transport, so"
            " that a number may depend on those at its own place alone",
        ),
        (
            rule.has_memory or (rule.stores == 1 and all(map(_same, whole, late))),
            "has_memory=False is for a rule whose moves depend on nothing before, and checkpoints then leave its stores"
            " and the version out; leave has_memory=True",
        ),
    ):
        if not holds:
            raise ValueError(f"{what}: {problem}.")


def _initial(rule: CenterRule, parts: Sequence[slice]) -> list[Tensor]:
    """The stores at the start, each part of them by itself."""
    begun = []
    for part in parts:
        center = _CENTER[part].clone()
        stores = list(rule.initial_stores(center))
        shapes = [store.shape if isinstance(store, Tensor) else None for store in stores]
        if shapes != [center.shape] * rule.stores:
            raise ValueError(
                f"initial_stores gives {len(stores)} values, and {rule.stores} tensors of the center's shape are due,"
                f" one for each of names={rule.names!r}"
            )
        if not (torch.equal(stores[0], _CENTER[part]) and torch.equal(center, _CENTER[part])):
            raise ValueError("initial_stores changes store 0, which is the center: workers start there")
        begun.append([store.to(torch.float64, copy=True) for store in stores])
    return [torch.cat(each) for each in zip(*begun, strict=True)]


def _moved(rule: CenterRule, stores: Sequence[Tensor], parts: Sequence[slice], version: int = 0) -> list[Tensor]:
    """The stores after a few moves of their parts."""
    stores = [store.clone() for store in stores]
    shown = repr(rule)
    for number in range(_MOVES):
        for part in parts:
            of_part = [store[part] for store in stores]
            difference = _DIFFERENCE[part] * (number + 1)
            given, places, before = list(of_part), [_place(store) for store in of_part], difference.clone()
            returned = rule.move_(of_part, difference, _RATE, version + number)
            if returned is not None:
                raise TypeError(f"move_ returns a {type(returned).__name__}; it moves the stores in place")
            same = len(of_part) == len(given) and all(map(operator.is_, of_part, given))
            if not same or [_place(store) for store in given] != places:
                raise ValueError("move_ puts other tensors in place of the stores; it moves them in place")
            if not torch.equal(difference, before):
                raise ValueError("move_ writes to the difference, which others read; it only reads it")
    if repr(rule) != shown:
        raise ValueError(f"move_ changes what the rule shows, to {rule!r}; what it remembers lies in its stores")
    return stores


def _place(store: Tensor) -> tuple[int, torch.Size]:
    """Where a store's numbers lie: a tensor can be given other memory, which the center would not see."""
    return store.data_ptr(), store.shape


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-9, atol=1e-12, equal_nan=True)
