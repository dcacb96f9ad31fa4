"""Rounded messages of a served center between nodes: nothing is lost, both ends remember the same, bytes are few."""

import os
from functools import partial

import numpy as np
import pytest
import torch
from ranks import run_ranks
from reference import MINIMA, round_robin_trace
from toys import Quadratic, Regression, quiet_trainer

from lightning_easgd import EASGDStrategy
from lightning_easgd.averagers.served.averager import CenterPart
from lightning_easgd.method.compression import make_codec
from lightning_easgd.method.rules import AsymmetricExchange, SymmetricExchange
from lightning_easgd.served_center import CenterError, InProcessCenter, Layout
from lightning_easgd.served_center.compressed_link import ServingEnd, WorkersEnd
from lightning_easgd.served_center.tcp_client import RemoteShard
from lightning_easgd.served_center.tcp_server import ShardServer

SECRET = b"0123456789abcdef"
LAYOUT = Layout.cut([(0, 1000)], 400)
dtypes = pytest.mark.parametrize("wire_dtype", ["bfloat16", "int8"])


class Link:
    """A center, its server and two workers of another node."""

    def __init__(self, wire_dtype, exchange, dtype=torch.float64):
        make = partial(make_codec, wire_dtype)
        self.links = []

        def serving():
            self.links.append(ServingEnd(make))
            return self.links[-1]

        self.center = InProcessCenter(LAYOUT, dtype, exchange)
        self.server = ShardServer(self.center, SECRET, 5.0, set(), make_link=serving)
        self.ends = [WorkersEnd(make) for _ in range(2)]
        self.shards = []
        for end in self.ends:  # one after the other, so that links are in this order
            address = ("127.0.0.1", self.server.port)
            self.shards.append(RemoteShard(address, server=0, rank=1, secret=SECRET, timeout=5.0, lost=set(), link=end))
            self.shards[-1].read(0, torch.empty(LAYOUT.size(0), dtype=dtype))

    def exchange(self, worker, x, rate):
        """What the worker takes for the answer to x."""
        message = x.clone()
        for chunk, part in enumerate(LAYOUT.chunks):
            self.shards[worker].begin(chunk, message[part], rate).wait()
        return message

    def close(self):
        for shard in self.shards:
            shard.close()
        self.server.close()


@pytest.fixture
def linked():
    opened = []

    def make(*arguments):
        opened.append(Link(*arguments))
        return opened[-1]

    yield make
    for each in opened:
        each.close()


@dtypes
@pytest.mark.parametrize("exchange", [SymmetricExchange(), AsymmetricExchange()])
def test_the_center_is_where_exact_messages_would_bring_it_but_for_residuals(wire_dtype, exchange, linked):
    link = linked(wire_dtype, exchange)
    generator = torch.Generator().manual_seed(0)
    workers = [torch.zeros(1000, dtype=torch.float64) for _ in range(2)]
    alpha = 0.4 if isinstance(exchange, AsymmetricExchange) else 1.0
    start = sum(worker.sum() for worker in workers)
    moved = 0.0
    for _ in range(40):
        for number, worker in enumerate(workers):
            step = torch.randn(1000, generator=generator, dtype=torch.float64)
            worker.add_(step)
            moved += step.sum()
            worker.sub_(alpha * link.exchange(number, worker, 0.4))
    center = torch.empty(1000, dtype=torch.float64)
    link.center.read_all(center)
    residuals = alpha * sum(end.residual(chunk).sum() for end in link.links for chunk in range(3))
    # What a worker has still to take was answered, and lies in the residual of its connection.
    total = sum(worker.sum() for worker in workers) + center.sum()
    assert float(total - residuals - start) == pytest.approx(float(moved), abs=1e-9)
    assert all(end.residual(0).abs().max() < 0.1 for end in link.links)


@dtypes
def test_both_ends_remember_the_same_bits(wire_dtype, linked):
    link = linked(wire_dtype, SymmetricExchange(), torch.float32)
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        link.exchange(0, 100 * torch.randn(1000, generator=generator), 0.3)
    for chunk in range(3):
        reference, residual = link.shards[0].link_state(chunk)
        assert (reference == link.links[0]._references[chunk]).all()
        assert (residual == link.links[0].residual(chunk)).all()
        assert residual.abs().max() > 0


def test_who_does_not_know_a_reference_cannot_round(linked):
    link = linked("int8", SymmetricExchange())
    state = torch.zeros(LAYOUT.size(0), dtype=torch.float64)
    link.ends[0].set_reference(0, state)
    with pytest.raises(CenterError, match=r"asks for nothing that is served here|is lost"):  # its message is unread
        link.exchange(0, torch.zeros(1000, dtype=torch.float64), 0.3)


def test_a_link_goes_on_in_the_centers_dtype():
    """What was saved in another one would not have the size that the server awaits."""
    seen = {}

    class Center(InProcessCenter):
        def load_link_state(self, chunk, state):
            seen[chunk] = [part.dtype for part in state]

    part = CenterPart(Center(LAYOUT, torch.float64, SymmetricExchange()), range(1))
    part.load_link_state({chunk: (torch.zeros(LAYOUT.size(chunk)),) * 2 for chunk in range(3)})
    assert seen == {chunk: [torch.float64] * 2 for chunk in range(3)}


def as_node():
    os.environ |= {"GROUP_RANK": os.environ["RANK"], "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


def train(wire_dtype):
    as_node()
    module = Quadratic(lr=0.1, steps=13)
    strategy = EASGDStrategy(mode="async", order="round_robin", tau=2, alpha=0.45, wire_dtype=wire_dtype)
    quiet_trainer(strategy=strategy, devices=1, num_nodes=2).fit(module)
    return module.trace, module.x.item(), strategy.communication.bytes_sent


@dtypes
def test_two_nodes_follow_the_recursion(wire_dtype):
    expected = round_robin_trace(MINIMA[:2], 13, 2, 0.45)
    for rank, (trace, center, _) in enumerate(run_ranks(train, 2, wire_dtype)):
        assert np.array(trace)[:, 0] == pytest.approx(expected[:, rank], abs=2e-2)
        assert center == pytest.approx(expected[-1, -1], abs=2e-2)


def bytes_of_a_run(wire_dtype):
    as_node()
    strategy = EASGDStrategy(mode="async", tau=1, wire_dtype=wire_dtype)
    module = torch.nn.Linear(512, 512)
    regression = Regression(batches=9)
    regression.configure_optimizers = lambda: torch.optim.SGD(regression.parameters(), lr=1e-4)
    regression.net = torch.nn.Sequential(torch.nn.Linear(4, 512), module, torch.nn.Linear(512, 1))
    quiet_trainer(strategy=strategy, devices=1, num_nodes=2, limit_val_batches=0).fit(regression)
    return strategy.communication.bytes_sent


def test_bytes_are_counted_as_they_are_sent():
    """One of two nodes keeps each chunk: half of the bytes cross; the first exchange is not rounded."""
    whole, half, quarter = (run_ranks(bytes_of_a_run, 2, dtype)[0] for dtype in (None, "bfloat16", "int8"))
    assert half < 0.8 * whole
    assert quarter < half


@dtypes
def test_a_resumed_run_goes_on_bit_for_bit(wire_dtype, tmp_path):
    def run():
        as_node()

        def fit(epochs, checkpoint=None):
            torch.manual_seed(0)
            module = Regression(batches=7)
            strategy = EASGDStrategy(mode="async", order="round_robin", tau=2, wire_dtype=wire_dtype)
            trainer = quiet_trainer(
                strategy=strategy, devices=1, num_nodes=2, max_epochs=epochs, limit_val_batches=0
            )  # fmt: skip
            trainer.fit(module, ckpt_path=checkpoint)
            return module, trainer

        whole, _ = fit(2)
        fit(1)[1].save_checkpoint(tmp_path / "half.ckpt")
        resumed, _ = fit(2, tmp_path / "half.ckpt")
        pairs = zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
        return all((a == b).all() for a, b in pairs)

    assert run_ranks(run, 2, timeout=120) == [True] * 2
