"""Bytes on the wire, by the kernel's own count: what each TCP socket of a rank has sent."""

import ctypes
import os
import socket
import stat
import sys

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from ranks import run_ranks
from toys import quiet_trainer

from lightning_easgd import EASGDStrategy, LocalStrategy
from lightning_easgd.callbacks import ddp_bytes
from lightning_easgd.lab.baselines.post_local_sgd import PostLocalSGDStrategy

# include/uapi/linux/tcp.h, struct tcp_info: tcpi_bytes_sent, a 64 bit count of payload bytes with those sent again, and
# tcpi_bytes_retrans, the latter alone: on a busy machine the kernel sends again what was only late.
BYTES_SENT, BYTES_SENT_AGAIN = 200, 208
FEATURES, STEPS, TAU = 500, 40, 10
PARAMETERS = FEATURES * FEATURES
RANKS = 2

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's counters are read as Linux has them"),
]


def sent_by_socket() -> dict[int, int]:
    """Bytes that each open TCP socket of this process has sent, each counted once; by the kernel's number of it."""
    counts = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            status = os.stat(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # the directory's own descriptor is gone by now
            continue
        if not stat.S_ISSOCK(status.st_mode):
            continue
        with socket.socket(fileno=os.dup(int(name))) as copy:
            if copy.family in (socket.AF_INET, socket.AF_INET6) and copy.type == socket.SOCK_STREAM:
                information = copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                if len(information) < BYTES_SENT_AGAIN + 8:
                    pytest.skip("this kernel does not count the bytes that a socket sends")
                first, again = (
                    ctypes.c_uint64.from_buffer_copy(information, offset).value
                    for offset in (BYTES_SENT, BYTES_SENT_AGAIN)
                )
                counts[status.st_ino] = first - again
    return counts


def sent_between(before: dict[int, int], after: dict[int, int]) -> int:
    """Bytes sent between two counts; a socket that has been closed meanwhile does not count."""
    return sum(count - before.get(number, 0) for number, count in after.items())


class Wide(L.LightningModule):
    """So many parameters that headers and control messages are nothing beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(FEATURES, FEATURES, bias=False)
        self.counts = []

    def training_step(self, batch, index):
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.randn((STEPS + TAU + 1) * RANKS, FEATURES), batch_size=1)

    def on_train_batch_end(self, outputs, batch, index):
        """Counts between the steps TAU + 1 and TAU + 1 + STEPS, when nothing is under way."""
        if index in (TAU, TAU + STEPS):
            if isinstance(self.trainer.strategy, EASGDStrategy):
                _ = self.trainer.strategy.center  # waits for the exchange
            dist.barrier()
            self.counts.append(sent_by_socket())
            dist.barrier()


def sent(make_strategy) -> list[int]:
    def train():
        module = Wide()
        quiet_trainer(strategy=make_strategy(), devices=RANKS).fit(module)
        return sent_between(*module.counts)

    return run_ranks(train, RANKS, timeout=100)


GRADIENTS = 4 * PARAMETERS


def through_group():
    return EASGDStrategy(tau=TAU, process_group_backend="gloo")


def test_ddp_sends_what_is_counted_for_it():
    for count in sent(DDPStrategy):
        assert count == pytest.approx(ddp_bytes(GRADIENTS, STEPS, RANKS), rel=0.01)


def test_easgd_sends_a_tenth_of_ddp():
    for count, ddp in zip(sent(through_group), sent(DDPStrategy), strict=True):
        assert ddp / count == pytest.approx(TAU, rel=0.01)


def test_easgd_sends_what_it_says():
    def train():
        strategy, module = through_group(), Said()
        quiet_trainer(strategy=strategy, devices=RANKS).fit(module)
        return sent_between(*module.counts), module.said

    for count, (said_before, said_after) in run_ranks(train, RANKS):
        assert count == pytest.approx(said_after - said_before, rel=0.01)
        assert said_after - said_before > 0


class Said(Wide):
    def __init__(self) -> None:
        super().__init__()
        self.said = []

    def on_train_batch_end(self, outputs, batch, index):
        super().on_train_batch_end(outputs, batch, index)
        if index in (TAU, TAU + STEPS):
            self.said.append(self.trainer.strategy.communication.bytes_sent)


def test_post_local_sgd_sends_a_tenth_of_ddp():
    for count in sent(lambda: PostLocalSGDStrategy(tau=TAU)):
        assert count == pytest.approx(ddp_bytes(GRADIENTS, STEPS // TAU, RANKS), rel=0.01)


def test_workers_that_share_memory_send_nothing():
    """As much as workers that do not communicate: the ranks' barriers."""
    assert sent(lambda: EASGDStrategy(tau=TAU)) == pytest.approx(sent(LocalStrategy), abs=0.0001 * GRADIENTS)


def test_workers_that_do_not_communicate_send_nothing():
    """The control: what the ranks say to each other beside the weights does not count."""
    for count in sent(LocalStrategy):
        assert count < 0.001 * GRADIENTS
