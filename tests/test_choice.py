"""Over which channel and by which sum workers exchange: a table, and an averaging on a channel of one's own."""

import pytest
import torch
from channels import Hub, on_threads
from reference import synchronous_trace
from toys import MINIMA

from lightning_easgd.averagers import Meeting, SynchronousAveraging, all_reduced_sums
from lightning_easgd.averagers.sync.choice import Choice, Setting, choose
from lightning_easgd.method.rates import MovingRates

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
ONE_HOST = {"is_one_host": True}
WITHIN = {"is_worker_on_host": True}


@pytest.mark.parametrize(
    ("setting", "choice"),
    [
        (Setting(CPU, "gloo", 10, 1, **ONE_HOST), Choice("shared", "direct", 10, True)),
        (Setting(CPU, "gloo", 10, 2, **ONE_HOST), Choice("shared", "direct", 10, True)),
        (Setting(CPU, "gloo", 10, 1, has_chosen_backend=True, **ONE_HOST), Choice("all-reduced", "gloo", 10, False)),
        (Setting(CPU, "gloo", 10, 1), Choice("all-reduced", "direct", 10, False)),
        (Setting(CPU, "gloo", 10, 1, wire_dtype="int8", **ONE_HOST), Choice("compressed", "direct", 10, True)),
        (Setting(CPU, "gloo", 10, 1, center_device="cpu", **ONE_HOST), Choice("shared", "direct", 10, True)),
        (Setting(GPU, "nccl", 10, 1, **ONE_HOST), Choice("all-reduced", "nccl", 10, True)),
        (Setting(GPU, "nccl", 10, 2, **ONE_HOST), Choice("all-reduced", "nccl", 1, True)),
        (Setting(GPU, "nccl", 10, 1, center_device="cpu", **ONE_HOST), Choice("all-reduced", "gloo", 1, True)),
        (Setting(GPU, "nccl", 10, 1, wire_dtype="bfloat16"), Choice("compressed", "nccl", 10, False)),
        (Setting(GPU, "gloo", 10, 1, has_chosen_backend=True), Choice("all-reduced", "gloo", 10, False)),
        (Setting(CPU, "gloo", 10, 1, **WITHIN), Choice("all-reduced", "direct", 10, False, joins_in_memory=True)),
        (Setting(CPU, "gloo", 10, 1, has_chosen_backend=True, **WITHIN), Choice("all-reduced", "gloo", 10, False)),
        (Setting(GPU, "nccl", 10, 1, **WITHIN), Choice("all-reduced", "nccl", 10, False)),
        (Setting(GPU, "nccl", 10, 1, center_device="cpu", **WITHIN), Choice("all-reduced", "gloo", 1, False, True)),
    ],
)
def test_what_is_chosen(setting, choice):
    assert choose(setting) == choice


def test_an_averaging_on_a_channel_of_ones_own():
    """Workers that are threads: no process group, no store, no Lightning."""
    control, data = Hub(2), Hub(2)

    def work(rank):
        parameter = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
        optimizer = torch.optim.SGD([parameter], lr=0.1)
        averaging = SynchronousAveraging(
            control.channel(rank),
            all_reduced_sums(lambda: data.channel(rank), 2),
            tau=2,
            rates=MovingRates(beta=0.8),
        )
        averaging.start([optimizer])
        (averager,) = averaging.averagers.values()
        positions = []
        for _ in range(7):
            averager.begin()
            parameter.grad = parameter.detach() - MINIMA[rank]
            optimizer.step()
            averager.finish()
            positions.append(parameter.item())
        averaging.meet(Meeting.TRAINING_END)
        return positions, averager.center_values()[0].item()

    expected = synchronous_trace(2, 7, tau=2, alpha=0.4, beta=0.8)
    for rank, (positions, center) in enumerate(on_threads(work, 2)):
        assert positions == pytest.approx(expected[:, rank], abs=1e-12)
        assert center == pytest.approx(expected[-1, -1], abs=1e-12)
