"""Independent references: the recursions of the paper in a few lines, and a blocking twin of the fast averager."""

from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch.optim import Optimizer
from toys import MINIMA

from lightning_easgd.averagers import ExchangeLine
from lightning_easgd.averagers.sync.finiteness import HostFiniteness
from lightning_easgd.method.rates import MovingRates


def synchronous_trace(
    workers: int, steps: int, tau: int, alpha: float, beta: float, lr: float = 0.1, delta: float = 0.0, minima=MINIMA
):
    """Rows (x_1, …, x_p, x̃) after each step of synchronous EASGD (δ = 0) or EAMSGD on f_i = ½(x - b_i)²."""
    minima = np.array(minima[:workers])
    x, v, center = np.ones(workers), np.zeros(workers), 1.0
    rows = []
    for t in range(steps):
        exchange = t % tau == 0
        difference = x - center
        v = delta * v - lr * (x + delta * v - minima)
        x = x + v - (alpha * difference if exchange else 0)
        center = center + (beta * difference.mean() if exchange else 0)
        rows.append((*x, center))
    return np.array(rows)


def round_robin_trace(minima, steps: int, tau: int, alpha: float, lr: float = 0.1):
    """Rows (x_1, …, x_p, x̃) after each step of asynchronous EASGD whose workers exchange in turn, from 1."""
    x, center, rows = np.ones(len(minima)), 1.0, []
    for t in range(steps):
        pulls = np.zeros(len(minima))
        if t % tau == 0:
            for i in range(len(minima)):
                pulls[i] = alpha * (x[i] - center)
                center += pulls[i]
        x = x - lr * (x - np.array(minima)) - pulls
        rows.append((*x, center))
    return np.array(rows)


class BlockingAverager:
    """Plain synchronous EASGD: the reduction is waited for at once, and the center moved before the step."""

    has_departed = is_expected = False
    has_exchanged = True
    finiteness = HostFiniteness()

    def __init__(self, optimizer: Optimizer, line: ExchangeLine, make_sum, *, tau, rates: MovingRates, **_) -> None:
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.centers = [parameter.detach().clone().float() for parameter in self.parameters]
        self.optimizer, self.tau, self.rates, self.clock = optimizer, tau, rates, 0

    def begin(self) -> None:
        self.pulls = []
        if self.clock == 0 or self.clock % self.tau:
            return
        workers = dist.get_world_size()
        alpha, beta = self.rates.resolve(workers, self.optimizer.param_groups[0]["lr"])
        differences = [p.detach() - center for p, center in zip(self.parameters, self.centers, strict=True)]
        mine = torch.cat([difference.flatten() for difference in differences])
        every = [torch.empty_like(mine) for _ in range(workers)]
        dist.all_gather(every, mine)
        total = sum(every[1:], every[0])  # in the order of the ranks
        torch.nn.utils.vector_to_parameters(
            torch.nn.utils.parameters_to_vector(self.centers).add(total, alpha=beta / workers), self.centers
        )
        self.pulls = [(p, difference, alpha) for p, difference in zip(self.parameters, differences, strict=True)]

    @torch.no_grad()
    def finish(self) -> None:
        for parameter, difference, alpha in self.pulls:
            parameter.sub_(difference, alpha=alpha)
        self.clock += 1

    def complete(self) -> None:
        pass

    def check_center(self) -> None:
        pass

    @property
    def center(self):
        return SimpleNamespace(flat=torch.nn.utils.parameters_to_vector(self.centers))

    @property
    def laid_out(self) -> list[torch.Tensor]:
        return self.parameters

    def is_finite(self) -> bool:
        return all(parameter.isfinite().all() for parameter in self.parameters)

    def center_checksum(self) -> int:
        return 0

    @torch.no_grad()
    def show_center(self) -> None:
        self.kept = [parameter.detach().clone() for parameter in self.parameters]
        for parameter, center in zip(self.parameters, self.centers, strict=True):
            parameter.copy_(center)

    @torch.no_grad()
    def show_worker(self) -> None:
        for parameter, value in zip(self.parameters, self.kept, strict=True):
            parameter.copy_(value)

    def center_values(self) -> list[torch.Tensor]:
        return self.centers

    def close(self) -> None:
        pass


def grouped_trace(
    rows, start, *, workers, size, steps, tau, alpha, beta, lr=0.1, momentum=0.0, clip=None, accumulate=1,
    outer_momentum=0.0, pull_to="old", delay=0,
):  # fmt: skip
    """Synchronous EASGD of workers of ``size`` data-parallel ranks on the toy ``TwoLayers``.

    Batch b of replica r is ``rows[b · replicas + r]``. Returns the workers, their momentum buffers and the center after
    the last step, each a list of arrays in the order of the module's parameters.
    """
    shapes = [value.shape for value in start]
    ends = np.cumsum([value.size for value in start])[:-1]
    x = np.stack([np.concatenate([value.ravel() for value in start])] * workers)
    buffers, center, velocity, due = np.zeros_like(x), x[0].copy(), np.zeros_like(x[0]), {}

    def parts(flat):
        return [part.reshape(shape) for part, shape in zip(np.split(flat, ends), shapes, strict=True)]

    for t in range(steps):
        exchange = t > 0 and t % tau == 0
        difference = (x - center) * exchange
        for w in range(workers):
            a, b, c = parts(x[w])
            gradient = np.zeros_like(center)
            for batch in range(t * accumulate, (t + 1) * accumulate):
                for rank in range(w * size, (w + 1) * size):
                    u, v, z = np.split(rows[batch * workers * size + rank], [2, 5])
                    first, second = a @ u - v, b @ u + c - z
                    each = [np.outer(first, u), np.outer(second, u), second]
                    gradient += np.concatenate([part.ravel() for part in each]) / (size * accumulate)
            if clip is not None:
                gradient *= min(1.0, clip / (np.linalg.norm(gradient) + 1e-6))
            buffers[w] = momentum * buffers[w] + gradient
        x = x - lr * buffers
        if pull_to == "old":
            x = x - alpha * difference
            if exchange:
                velocity = outer_momentum * velocity + beta * difference.mean(0)
                center = center + velocity
        else:
            if (t + 1) % tau == 0:
                velocity = outer_momentum * velocity + beta * (x - center).mean(0)
                center = center + velocity
                due[t + delay] = alpha * (x - center)
            x = x - due.pop(t, 0)
    return [parts(worker) for worker in x], [parts(each) for each in buffers], parts(center)
