"""Collecting a nested state from every worker on rank 0, without a second copy of its tensors."""

import io
import pickle
from datetime import timedelta
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["gather_states"]


def gather_states(state: Any, timeout: timedelta, what: str = "gather_states") -> list[Any] | None:
    """The states of all workers on rank 0, in the order of the ranks; None on the others.

    All workers call it at the same point. Tensors travel as they are, one message each, and arrive on the CPU, laid out
    as they were: fused optimizers take it that a state has its parameter's strides.

    Args:
        state: Containers and primitives that can be pickled, and dense tensors. Not changed.
        timeout: How long to wait for the slowest worker.
        what: What is being done, for errors.

    Raises:
        RuntimeError: If a worker is lost, does not come in time, or cannot make its messages.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [state]
    dist.barrier()  # a lost worker is noticed at once; a new group would wait for it until the timeout
    group = dist.new_group(backend="gloo", timeout=timeout)  # CPU tensors, whatever the backend of the run
    try:
        messages = _agreed_messages(state, group, what)
        if dist.get_rank() == 0:
            return [state, *(_receive(rank, group) for rank in range(1, dist.get_world_size()))]
        for message in messages:
            if message.numel():
                dist.send(message, 0, group)
        return None
    finally:
        dist.destroy_process_group(group)


def _agreed_messages(state: Any, group: Any, what: str) -> list[Tensor]:
    """This worker's messages, once all workers have theirs: nobody waits for one that will not be sent."""
    messages: list[Tensor] = []
    problem: Exception | None = None
    try:
        messages = _messages(state) if dist.get_rank() else []
    except Exception as error:
        problem = error
    failed = torch.zeros(dist.get_world_size(), dtype=torch.uint8)
    failed[dist.get_rank()] = problem is not None
    dist.all_reduce(failed, group=group)
    if problem is not None:
        raise problem
    if failed.any():
        raise RuntimeError(
            f"{what}: rank {int(failed.nonzero()[0])} could not prepare its state for the checkpoint, which is not"
            " written; look for its error."
        )
    return messages


def _messages(state: Any) -> list[Tensor]:
    outline = io.BytesIO()
    pickler = _Pickler(outline)
    pickler.dump(state)
    orders = [sorted(range(tensor.dim()), key=tensor.stride, reverse=True) for tensor in pickler.tensors]
    pairs = zip(pickler.tensors, orders, strict=True)
    tensors = [tensor.detach().cpu().permute(order).contiguous() for tensor, order in pairs]
    layouts = [(tensor.shape, tensor.dtype, order) for tensor, order in zip(tensors, orders, strict=True)]
    message = torch.frombuffer(bytearray(pickle.dumps((outline.getvalue(), layouts))), dtype=torch.uint8)
    return [torch.tensor(message.numel()), message, *map(_bytes_of, tensors)]


def _receive(rank: int, group: Any) -> Any:
    size = torch.tensor(0)
    dist.recv(size, rank, group)
    message = torch.empty(int(size), dtype=torch.uint8)
    dist.recv(message, rank, group)
    outline, layouts = pickle.loads(message.numpy().tobytes())
    tensors = []
    for shape, dtype, order in layouts:
        tensor = torch.empty(shape, dtype=dtype)
        if tensor.numel():
            dist.recv(_bytes_of(tensor), rank, group)
        tensors.append(tensor.permute([order.index(dimension) for dimension in range(len(order))]))
    return _Unpickler(io.BytesIO(outline), tensors).load()


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)


@final
class _Pickler(pickle.Pickler):
    """Leaves the tensors out, and remembers them."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: list[Tensor] = []

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, Tensor):
            return None
        self.tensors.append(value)
        return len(self.tensors) - 1


@final
class _Unpickler(pickle.Unpickler):
    """Puts the tensors back."""

    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, number: int) -> Tensor:
        return self._tensors[number]
