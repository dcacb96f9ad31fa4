"""What workers have in common of tensors that are in no exchange, without processes."""

import pytest
import torch
from channels import Hub, on_threads

from lightning_easgd.averagers.common_values import common_values
from lightning_easgd.tensors.buffers import keep_buffers, restore_buffers


def common(*of_workers):
    """The common values as each worker finds them."""
    hub = Hub(len(of_workers))
    return on_threads(lambda rank: common_values(of_workers[rank], hub.channel(rank)), len(of_workers))


class Counting:
    """A channel of one worker's own hub that counts what it sends."""

    def __init__(self, channel):
        self.channel, self.rank, self.size, self.sent = channel, channel.rank, channel.size, []

    def sum(self, buffer):
        self.sent.append(buffer.numel())
        return self.channel.sum(buffer)


def test_what_is_the_same_everywhere_is_named_and_not_sent():
    hub, sent = Hub(3), {}

    def work(rank):
        channel = Counting(hub.channel(rank))
        found = common_values({"a": torch.ones(1000), "b": torch.arange(5)}, channel)
        sent[rank] = channel.sent
        return found

    for found in on_threads(work, 3):
        assert found.same == {"a", "b"}
        assert (found.values, found.own) == ({}, frozenset())
    assert all(numbers == [6] for numbers in sent.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
def test_floating_point_values_are_the_mean_in_their_dtype(dtype):
    results = common(*({"x": torch.full((2, 3), float(rank)).to(dtype)} for rank in (0, 1, 5)))
    for found in results:
        assert found.values["x"].dtype is dtype
        assert found.values["x"].tolist() == torch.full((2, 3), 2.0).to(dtype).tolist()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
def test_integers_are_rank_zeros(dtype):
    for found in common({"x": torch.tensor([0, 1]).to(dtype)}, {"x": torch.tensor([1, 0]).to(dtype)}):
        assert found.values["x"].tolist() == torch.tensor([0, 1]).to(dtype).tolist()


def test_a_value_that_is_not_finite_is_left_out_of_the_mean():
    nan = torch.tensor([1.0, float("nan")])
    for found in common({"x": torch.ones(2)}, {"x": nan}, {"x": torch.full((2,), 3.0)}):
        assert found.values["x"].tolist() == [2.0, 2.0]
    for found in common({"x": nan}, {"x": nan + 1}):
        assert found.values["x"][0] == 1.5
        assert found.values["x"][1].isnan()


def test_shape_dtype_and_presence_decide_what_is_each_workers_own():
    first = {"same": torch.ones(2), "mean": torch.zeros(2), "shape": torch.ones(2), "dtype": torch.ones(2)}
    second = {"same": torch.ones(2), "mean": torch.ones(2), "shape": torch.ones(3), "dtype": torch.ones(2).double()}
    for found in common(first | {"only": torch.ones(1)}, second):
        assert found.own == {"shape", "dtype", "only"}
        assert found.same == {"same"}
        assert found.values["mean"].tolist() == [0.5, 0.5]


SPARSE = torch.eye(2).to_sparse(), (2 * torch.eye(2)).to_sparse()
EXPANDED = torch.ones(1).expand(3), torch.zeros(1).expand(3)


@pytest.mark.parametrize("values", [SPARSE, EXPANDED], ids=["sparse", "expanded"])
def test_what_cannot_be_written_to_is_each_workers_own_if_it_differs(values):
    assert all(found.own == {"x"} for found in common(*({"x": value} for value in values)))
    assert all(found.same == {"x"} for found in common(*({"x": values[0]} for _ in values)))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (2, 3)])
def test_every_shape(shape):
    for found in common({"x": torch.zeros(shape)}, {"x": torch.ones(shape)}):
        value = found.values.get("x", torch.zeros(shape))
        assert value.tolist() == torch.full(shape, 0.5).tolist()


def test_a_tensor_that_is_not_contiguous():
    for found in common(*({"x": torch.arange(6.0).view(2, 3).T + rank} for rank in (0, 2))):
        assert found.values["x"].tolist() == (torch.arange(6.0).view(2, 3).T + 1).tolist()


def test_large_tensors_travel_in_pieces(monkeypatch):
    monkeypatch.setattr("lightning_easgd.averagers.common_values._PIECE", 7)
    for found in common(*({"x": torch.arange(20.0) * rank} for rank in (1, 3))):
        assert found.values["x"].tolist() == (torch.arange(20.0) * 2).tolist()


def test_nothing_at_all():
    for found in common({}, {}):
        assert (found.values, found.same, found.own) == ({}, frozenset(), frozenset())


# A module's buffers, kept and put back


class Module(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("plain", torch.ones(3))
        self.register_buffer("growing", torch.zeros(0))
        self.register_buffer("mask", torch.ones(1).expand(4))
        self.register_buffer("none", None)


def test_buffers_come_back_whatever_was_done_to_them():
    module = Module()
    objects = dict(module.named_buffers())
    kept = keep_buffers(module)
    module.plain.fill_(-0.0)
    module.growing.resize_(5).fill_(1.0)
    module.mask = torch.zeros(2)
    del module._buffers["plain"]
    restore_buffers(kept)
    assert all(objects[name] is buffer for name, buffer in module.named_buffers())
    assert module.plain.tolist() == [1.0] * 3
    assert module.growing.shape == (0,)
    assert module.mask.tolist() == [1.0] * 4


def test_a_buffer_whose_dtype_was_changed_comes_back():
    module = Module()
    kept = keep_buffers(module)
    module.plain.data = torch.arange(2)
    restore_buffers(kept)
    assert module.plain.dtype is torch.float32
    assert module.plain.tolist() == [1.0] * 3
