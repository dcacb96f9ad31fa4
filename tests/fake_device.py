"""A device that computes on the CPU, at once, and finds accesses that nothing orders.

Each stream, each communicator and the host is an actor with a vector clock. An operation that a program puts into a
stream comes after what the host has done before it and after what is in that stream; between two actors there is no
order but by an event or a wait. Two accesses to one storage, of which one writes, are a race unless one of them is
known to the other's actor. So a test fails when a wait is removed, though on the CPU the numbers would be right.
"""

from collections import Counter, defaultdict
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HOST = "host"


class RaceError(AssertionError):
    """Two accesses that nothing orders."""


class Stream:
    def __init__(self, fake, name):
        self.fake, self.name = fake, name

    def wait_stream(self, other):
        self.fake.know(self.name, self.fake.clocks[other.name])


class Event:
    def __init__(self, fake, blocking):
        self.fake, self.blocking, self.clock = fake, blocking, {}

    def record(self, stream):
        self.clock = dict(self.fake.clocks[stream.name])

    def synchronize(self):
        self.fake.log.append("sleeps" if self.blocking else "spins")
        self.fake.know(HOST, self.clock)


class FakeDevice(TorchDispatchMode):
    """Stands in for :mod:`torch.cuda`; inside ``with`` it watches all operations.

    Attributes:
        stalls: Operations by which the host waited for a stream, by name.
        log: What the host did at events.
    """

    def __init__(self):
        super().__init__()
        self.clocks = defaultdict(Counter)
        self.default = Stream(self, "default")
        self._current = self.default
        self._of_host = set()
        self._written = {}
        self._read = defaultdict(dict)
        self._streams = 0
        self._kept = []  # storages that were seen, so that no other gets the address of one
        self.stalls = Counter()
        self.log = []

    # torch.cuda's names

    def Stream(self, device):
        self._streams += 1
        return Stream(self, f"side {self._streams}")

    def Event(self, *, blocking=False):
        return Event(self, blocking)

    def current_stream(self, device=None):
        return self._current

    @contextmanager
    def stream(self, stream):
        before, self._current = self._current, stream
        try:
            yield
        finally:
            self._current = before

    # the rest is the test's

    def host_memory(self, tensor):
        """Take a tensor for one in host memory: what uses no other is the host's own work."""
        key = self._key(tensor)
        self._of_host.add(key)
        self._written.pop(key, None)  # as it was made
        return tensor

    def know(self, actor, clock):
        self.clocks[actor] |= Counter(clock)

    def _key(self, tensor):
        storage = tensor.untyped_storage()
        self._kept.append(storage)
        return storage.data_ptr()

    def _access(self, actor, tensor, writes, what):
        key, clock = self._key(tensor), self.clocks[actor]
        others = [self._written[key]] if key in self._written else []
        others += self._read[key].items() if writes else []
        for other, time in others:
            if clock[other] < time:
                raise RaceError(f"{what} on {actor}: nothing orders it and an access on {other}")
        if writes:
            self._written[key] = actor, clock[actor]
            self._read[key] = {}
        else:
            self._read[key][actor] = clock[actor]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        places = {self._key(tensor) in self._of_host for tensor in tensors}
        actor = HOST if places == {True} else self._current.name
        if name == "_local_scalar_dense" and actor != HOST:
            self.stalls[name] += 1
            self.know(HOST, self.clocks[actor])
        crosses = places == {True, False}
        if (
            name.startswith(("copy_", "_foreach_copy_"))
            and crosses
            and not (kwargs.get("non_blocking") or args[2:3] == (True,))
        ):
            self.stalls[name] += 1
        if actor != HOST:
            self.know(actor, self.clocks[HOST])
        self.clocks[actor][actor] += 1
        outcome = func(*args, **kwargs)
        if func.is_view:
            return outcome
        written = {
            self._key(tensor)
            for argument, value in [*zip(func._schema.arguments, args, strict=False), *self._keywords(func, kwargs)]
            if argument.alias_info is not None and argument.alias_info.is_write
            for tensor in tree_leaves(value)
            if isinstance(tensor, torch.Tensor)
        }
        results = [each for each in tree_leaves(outcome) if isinstance(each, torch.Tensor)]
        for tensor in [*tensors, *results]:
            key = self._key(tensor)
            fresh = all(tensor is not each for each in tensors)
            self._access(actor, tensor, key in written or fresh, name)
        return outcome

    def _keywords(self, func, kwargs):
        arguments = {argument.name: argument for argument in func._schema.arguments}
        return [(arguments[name], value) for name, value in kwargs.items() if name in arguments]
