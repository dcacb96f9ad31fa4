"""The methods' recursions in float64 NumPy, on vectors: independent of the package and of torch's optimizers."""

from collections.abc import Callable

import numpy as np

SIZE = 5  # elements of x
_CENTERS = (2.0, -3.0, 1.0, -0.5)


def minima(ranks: int) -> np.ndarray:
    """b_i of ½‖x - b_i‖², one row for each rank; no two elements are alike, so that none can stand for another."""
    return np.array(_CENTERS[:ranks])[:, None] + np.arange(SIZE) / 2


class Sgd:
    """v ← δv - ηg(x + δv), x ← x + v, with the norm of g clipped, and one step left out as a gradient scaler does."""

    def __init__(self, lr=0.1, delta=0.0, clip=np.inf, skip=None):
        self.lr, self.delta, self.clip, self.skip = lr, delta, clip, skip
        self.v, self.t = 0.0, -1

    def move(self, x, minimum):
        self.t += 1
        if self.t == self.skip:
            return 0.0
        gradient = x + self.delta * self.v - minimum
        gradient = gradient * min(1.0, self.clip / (np.linalg.norm(gradient) + 1e-6))
        self.v = self.delta * self.v - self.lr * gradient
        return self.v


class Adam:
    def __init__(self, lr=0.1, betas=(0.9, 0.999), eps=1e-8):
        self.lr, self.betas, self.eps = lr, betas, eps
        self.m = self.s = 0.0
        self.t = 0

    def move(self, x, minimum):
        (a, b), gradient = self.betas, x - minimum
        self.t += 1
        self.m = a * self.m + (1 - a) * gradient
        self.s = b * self.s + (1 - b) * gradient**2
        return -self.lr * (self.m / (1 - a**self.t)) / (np.sqrt(self.s / (1 - b**self.t)) + self.eps)


Local = Callable[[int], Sgd | Adam]
"""Makes the optimizer of a rank."""


def synchronous(b, steps, tau, alpha, beta, local: Local):
    """Rows (x_1, …, x_p, x̃), shape (steps, p + 1, elements), of synchronous EASGD, EAMSGD or another optimizer."""
    workers = [local(rank) for rank in range(len(b))]
    x, center, rows = np.ones_like(b), np.ones_like(b[0]), []
    for t in range(steps):
        exchange = t % tau == 0
        difference = x - center
        x = (
            np.stack([x[i] + worker.move(x[i], b[i]) for i, worker in enumerate(workers)])
            - exchange * alpha * difference
        )
        center = center + exchange * beta * difference.mean(0)
        rows.append([*x, center])
    return np.array(rows)


def round_robin(b, steps, tau, alpha, local: Local, beta=None):
    """The same of asynchronous EASGD and EAMSGD, whose workers exchange in turn; β of an asymmetric exchange."""
    workers = [local(rank) for rank in range(len(b))]
    push = alpha if beta is None else beta / len(b)
    x, center, rows = np.ones_like(b), np.ones_like(b[0]), []
    for t in range(steps):
        pulls = np.zeros_like(x)
        for i in range(len(b)) if t % tau == 0 else ():
            difference = x[i] - center
            pulls[i] = alpha * difference
            center = center + push * difference
        x = np.stack([x[i] + worker.move(x[i], b[i]) for i, worker in enumerate(workers)]) - pulls
        rows.append([*x, center])
    return np.array(rows)


def downpour(b, steps, tau, local: Local):
    workers = [local(rank) for rank in range(len(b))]
    x, center, update, rows = np.ones_like(b), np.ones_like(b[0]), np.zeros_like(b), []
    for t in range(steps):
        for i in range(len(b)) if t % tau == 0 else ():
            center = center + update[i]
            x[i], update[i] = center, 0
        for i, worker in enumerate(workers):
            move = worker.move(x[i], b[i])
            x[i] += move
            update[i] += move
        rows.append([*x.copy(), center])
    return np.array(rows)


def post_local(b, steps, tau, warmup, lr=0.1):
    """Rows (x_1, …, x_p, mean): DDP for ``warmup`` steps, then averaged after the steps warmup + 1, + 1 + τ, …."""
    x, rows = np.ones_like(b), []
    for t in range(steps):
        gradient = x - b
        x = x - lr * (gradient.mean(0) if t < warmup else gradient)
        if t >= warmup and (t - warmup) % tau == 0:
            x = np.broadcast_to(x.mean(0), x.shape)
        rows.append([*x, x.mean(0)])
    return np.array(rows)
