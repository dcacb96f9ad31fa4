"""What a worker that comes to others gets of what nobody averages."""

import pytest
import torch
from torch import nn

from lightning_easgd.averagers import ExchangeError
from lightning_easgd.strategies.handed_values import HandedValues, take_over
from lightning_easgd.strategies.outside_values import OutsideValues


class Net(nn.Module):
    def __init__(self, value, width=3):
        super().__init__()
        self.teacher = nn.Linear(width, 1, bias=False).requires_grad_(False)
        self.norm = nn.BatchNorm1d(2, affine=False)
        self.register_buffer("own", torch.full((2,), value))
        self.register_buffer("bank", torch.full((width,), value))
        self._ddp_params_and_buffers_to_ignore = ["own"]
        nn.init.constant_(self.teacher.weight, value)
        self.norm.running_mean.fill_(value)
        self.norm.num_batches_tracked.fill_(int(value))


def outside_of(net, *, with_buffers=True):
    ignored = net._ddp_params_and_buffers_to_ignore
    return OutsideValues(net, [], list, ignored=ignored, with_buffers=with_buffers, strategy="EASGDStrategy")


def test_it_has_what_the_other_has():
    living, coming = Net(7.0), Net(1.0)
    handed = HandedValues(outside_of(living), most=12).packed()
    living.norm.running_mean.zero_()  # it goes on
    values = take_over(outside_of(coming), handed, "EASGDStrategy")
    assert coming.teacher.weight.tolist() == [[7.0] * 3]
    assert coming.norm.running_mean.tolist() == [7.0] * 2
    assert coming.norm.num_batches_tracked == 7
    assert coming.own.tolist() == [1.0] * 2
    assert {"teacher.weight", "norm.running_mean", "bank"} < values.keys()


def test_buffers_that_are_each_workers_own_stay():
    coming = Net(1.0)
    handed = HandedValues(outside_of(Net(7.0), with_buffers=False), most=12).packed()
    take_over(outside_of(coming, with_buffers=False), handed, "EASGDStrategy")
    assert coming.teacher.weight.tolist() == [[7.0] * 3]
    assert coming.norm.running_mean.tolist() == [1.0] * 2


def test_what_is_sharded_is_compared_and_not_sent(monkeypatch):
    """The ranks of a worker may get their parts from different workers."""
    monkeypatch.setattr("lightning_easgd.strategies.handed_values.is_shard", lambda tensor: tensor.dim() == 2)
    handed = HandedValues(outside_of(Net(7.0)), most=10**6).packed()
    assert handed["checksums"].keys() == {"teacher.weight"}
    assert "bank" in handed["values"]


def test_a_large_frozen_model_is_compared_and_not_sent():
    handed = HandedValues(outside_of(Net(7.0)), most=11).packed()
    assert "teacher.weight" not in handed["values"]
    same, other = Net(7.0), Net(1.0)
    same.norm.running_mean.zero_()
    take_over(outside_of(same), handed, "EASGDStrategy")
    assert same.norm.running_mean.tolist() == [7.0] * 2
    with pytest.raises(ExchangeError, match=r"^EASGDStrategy\(.*\): teacher\.weight, of .* not trained, are not the"):
        take_over(outside_of(other), handed, "EASGDStrategy")


def test_what_is_not_alike_stays_and_is_told():
    coming = Net(1.0, width=4)
    handed = HandedValues(outside_of(Net(7.0)), most=12).packed()
    outside = outside_of(coming)
    with pytest.warns(RuntimeWarning, match=r"bank, teacher\.weight differ from the other workers'"):
        take_over(outside, handed, "EASGDStrategy")
    assert coming.bank.tolist() == [1.0] * 4
    assert coming.norm.running_mean.tolist() == [7.0] * 2
