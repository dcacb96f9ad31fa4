"""What a worker that comes to others gets of what nobody averages: buffers, teachers, frozen weights."""

import warnings
from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

from lightning_easgd.averagers import ExchangeError
from lightning_easgd.strategies.outside_values import OutsideValues, listed
from lightning_easgd.tensors.buffers import can_be_written
from lightning_easgd.tensors.checksums import checksum
from lightning_easgd.tensors.shards import is_shard, local

__all__ = ["HandedValues", "take_over"]


@final
class HandedValues:
    """What to send: values, and checksums in place of the values of too many parameters, such as a pretrained model's.

    And of sharded ones, of which the ranks of a worker may get their parts from different workers.

    Args:
        outside: This worker's.
        most: The most bytes of parameters.
    """

    def __init__(self, outside: OutsideValues, most: int) -> None:
        tensors = outside.tensors()
        parameters = tensors.keys() - outside.buffers().keys()
        is_too_much = sum(local(tensors[name]).nbytes for name in parameters) > most
        self._tensors = {name: local(tensor) for name, tensor in tensors.items()}
        self._compared = [name for name in tensors if name in parameters and (is_too_much or is_shard(tensors[name]))]

    def packed(self) -> dict[str, Any]:
        """The values of now; called by any thread."""
        checksums = {name: checksum(self._tensors[name]) for name in self._compared}
        values = {n: tensor.to("cpu", copy=True) for n, tensor in self._tensors.items() if n not in checksums}
        return {"values": values, "checksums": checksums}


@torch.no_grad()
def take_over(outside: OutsideValues, handed: Mapping[str, Any], strategy: str) -> Mapping[str, Tensor]:
    """Let this worker's values be those of another one; what is not alike on both stays as it is, with a warning.

    Args:
        outside: This worker's; is written to.
        handed: Of :meth:`HandedValues.packed`.
        strategy: Name of the strategy, for errors.

    Returns:
        The new values, by name.

    Raises:
        ExchangeError: If parameters of which there are only checksums differ.
    """
    tensors, values = {name: local(tensor) for name, tensor in outside.tensors().items()}, handed["values"]
    sums = {name: checksum(tensors[name]) for name in handed["checksums"].keys() & tensors.keys()}
    other = sorted(name for name, value in handed["checksums"].items() if sums.get(name) != value)
    if other:
        raise ExchangeError(
            f"{strategy}(fault_tolerance=...): {listed(other)}, of the parameters that are not trained, are not the"
            " other workers', and sharded or too large to be sent; load the same ones in every worker."
        )
    alike = {
        name: values[name]
        for name, tensor in tensors.items()
        if name in values
        and (values[name].shape, values[name].dtype) == (tensor.shape, tensor.dtype)
        and can_be_written(tensor)
    }
    for name, value in alike.items():
        tensors[name].copy_(value)
    unlike = sorted((tensors.keys() | values.keys()) - alike.keys() - handed["checksums"].keys())
    if unlike:
        warnings.warn(
            f"{strategy}(fault_tolerance=...): {listed(unlike)} differ from the other workers' in shape or dtype, or"
            " are not there on both; this worker keeps its own.",
            RuntimeWarning,
            stacklevel=2,
        )
    return alike
