r"""The largest curvature of a loss: power iteration on products of its Hessian with vectors."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, final

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

__all__ = ["Estimate", "HessianProduct", "PowerIteration", "Product"]

Product: TypeAlias = Callable[[list[Tensor]], list[Tensor]]
"""A symmetric linear map on lists of tensors."""

_MOVES = (1e-3, 1e-4, 1e-2)
"""How far parameters are moved, relative to their norm, to see how the gradient changes."""

_ROUNDING = 3e-6
"""Of a float32 gradient, relative to its norm."""

_EIGENVECTOR = 0.1
"""‖Av - λv‖² / λ² above which v is a mixture of eigenvectors whose λ stands still, rather than nearly one of them."""


@final
class HessianProduct:
    r"""The map :math:`u \mapsto D (H + W) D\, u` with the Hessian H of a loss at one point.

    With :math:`D^2` the step sizes of the parameters relative to the largest, η, and W their weight decay, a step of
    gradient descent on a quadratic is :math:`x \leftarrow x - \eta D^2 (H + W) x`, whose stability the largest
    eigenvalue h of this symmetric map decides: by ηh, as if all parameters had the same η.

    The graph of the gradient is made once, which takes somewhat more than a gradient, and is kept in memory; each
    product is a backward pass through it.

    Args:
        loss: The loss as a function of the parameters, by name; the same at each call.
        point: The parameters, float32 or float64. They are not written to.
        steps: Step size of each parameter relative to the largest, in [0, 1]; 1 unless given.
        decay: Weight decay of each parameter; 0 unless given.

    Raises:
        RuntimeError: If the loss does not depend on the parameters, or has no gradient.
    """

    def __init__(
        self,
        loss: Callable[[Mapping[str, Tensor]], Tensor],
        point: Mapping[str, Tensor],
        *,
        steps: Mapping[str, float] | None = None,
        decay: Mapping[str, float] | None = None,
    ) -> None:
        self._at = at = {name: value.detach().requires_grad_() for name, value in point.items()}
        self._variables = list(at.values())
        self._roots = [math.sqrt((steps or {}).get(name, 1.0)) for name in at]
        self._decay = [(decay or {}).get(name, 0.0) for name in at]
        self._loss = loss
        self._gradient = _gradient(loss, at)

    def __call__(self, vector: list[Tensor]) -> list[Tensor]:
        """The product with a vector, one tensor for each parameter."""
        scaled = list(torch._foreach_mul(vector, self._roots))
        curved = [(g, u) for g, u in zip(self._gradient, scaled, strict=True) if g.requires_grad]
        if curved:
            product = torch.autograd.grad(
                [g for g, _ in curved],
                self._variables,
                [u for _, u in curved],
                retain_graph=True,
                materialize_grads=True,
            )
        else:  # the loss is linear
            product = tuple(map(torch.zeros_like, self._variables))
        return self._scaled(product, scaled)

    @torch.no_grad()
    def check(self, vector: list[Tensor]) -> None:
        """Compare the product with a vector with a difference of two gradients, where the loss calls for it.

        A backward pass that is not differentiable (of a ``torch.autograd.Function``) may come without an error: the
        curvature behind it then looks like zero. torch's own are differentiable or raise one, and a loss of these alone
        is not compared: at kinks (of ReLUs, near any point of a wide network) gradients jump, by what no second
        derivative has. Elsewhere it takes up to three gradients.

        Raises:
            RuntimeError: If they have nothing in common, whichever the distance of the two points, and do not come
                closer as it shrinks.
        """
        with torch.enable_grad():
            if not _has_foreign_backward(self._loss(self._at)):
                return
        product = self(vector)
        direction = list(torch._foreach_mul(vector, self._roots))
        size = math.sqrt(_dot(self._variables, self._variables) / max(_dot(direction, direction), 1e-30))
        gradient = [part.detach() for part in self._gradient]
        noise = _ROUNDING * math.sqrt(_dot(gradient, gradient))
        errors = []
        for move in _MOVES:
            step = move * (size or 1.0)
            there = {
                name: (value.detach() + step * part).requires_grad_()
                for (name, value), part in zip(self._at.items(), direction, strict=True)
            }
            moved = [part.detach() for part in _gradient(self._loss, there)]
            change = torch._foreach_div(torch._foreach_sub(moved, gradient), step)
            difference = self._scaled(change, direction)
            apart = torch._foreach_sub(difference, product)
            errors.append(math.sqrt(_dot(apart, apart)))
            most = max(_dot(difference, difference), _dot(product, product))
            if errors[-1] <= math.sqrt(most) / 2 + noise / step:
                return
        if min(errors) <= max(errors) / 5:  # no curvature at this very point
            return
        raise RuntimeError("its second derivative is not that of its gradient; some backward pass has none")

    def _scaled(self, curved: Sequence[Tensor], scaled: Sequence[Tensor]) -> list[Tensor]:
        decayed = torch._foreach_mul(list(scaled), self._decay)
        return list(torch._foreach_mul(torch._foreach_add(list(curved), decayed), self._roots))


@final
@dataclass(frozen=True)
class Estimate:
    """An estimate of a largest eigenvalue.

    Attributes:
        value: The eigenvalue, from below; NaN where the map has a value that is not finite.
        products: Products it took.
        converged: Whether the last change was within the tolerance.
    """

    value: float
    products: int
    converged: bool


@final
class PowerIteration:
    r"""Estimates the largest eigenvalue of symmetric maps that change slowly, each time from the last eigenvector.

    .. math:: \lambda = v^T A v, \qquad v \leftarrow \frac{(A + sI) v}{\|(A + sI) v\|}

    until λ changes by at most ``tolerance`` · λ. The shift s is 0 until an eigenvalue below zero turns out to be the
    largest in modulus; then its modulus, so that the iteration goes on to the largest one.

    A Rayleigh quotient is never above the largest eigenvalue: an iteration that ends early underestimates. With the
    ratio r of the second largest to the largest eigenvalue its error falls by r² with each product, and is about
    tolerance / (r⁻² - 1) at the end.

    Args:
        iterations: Most products of one estimate.
        tolerance: Relative change at which to end.
    """

    def __init__(self, iterations: int = 20, tolerance: float = 0.01) -> None:
        self._iterations = iterations
        self._tolerance = tolerance
        self._vector: list[Tensor] | None = None
        self._shift = 0.0

    @property
    def vector(self) -> list[Tensor] | None:
        """The last estimate of the eigenvector."""
        return self._vector

    @torch.no_grad()
    def estimate(self, product: Product, like: Sequence[Tensor]) -> Estimate:
        """Estimates the largest eigenvalue.

        Args:
            product: The map.
            like: Tensors of the shapes, dtypes and devices of its argument.
        """
        vector = self._start(like)
        value, known, converged, products = math.nan, math.nan, False, 0
        while products < self._iterations and not converged:
            image = product(vector)
            products += 1
            value = _dot(vector, image)
            size = math.sqrt(_dot(image, image))
            if not math.isfinite(size):
                self._vector = None
                return Estimate(math.nan, products, converged=False)
            if abs(value - known) <= self._tolerance * abs(value) or size == 0:
                mixed = size**2 - value**2 > _EIGENVECTOR * value**2
                converged = not mixed and value >= -self._shift
                if not converged:  # something at least as large below zero
                    self._shift = max(self._shift, size)
            known = value
            torch._foreach_add_(image, torch._foreach_mul(vector, self._shift))
            norm = math.sqrt(_dot(image, image))
            if norm > 0:
                vector = list(torch._foreach_mul(image, 1 / norm))
        self._vector = vector
        return Estimate(value, products, converged)

    def _start(self, like: Sequence[Tensor]) -> list[Tensor]:
        if self._vector is not None and [v.shape for v in self._vector] == [tensor.shape for tensor in like]:
            return [v.to(tensor) for v, tensor in zip(self._vector, like, strict=True)]
        generator = torch.Generator().manual_seed(0)  # training's own generators are not touched
        drawn = [torch.randn(tensor.shape, generator=generator).to(tensor) for tensor in like]
        return list(torch._foreach_mul(drawn, 1 / math.sqrt(_dot(drawn, drawn))))


def _gradient(loss: Callable[[Mapping[str, Tensor]], Tensor], at: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        return torch.autograd.grad(loss(at), list(at.values()), create_graph=True, materialize_grads=True)


def _has_foreign_backward(loss: Tensor) -> bool:
    """Whether a backward pass on the way to a loss is written outside of torch, in Python or in C++."""
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if isinstance(node, BackwardCFunction) or "CppNode" in node.name():
            return True
        seen.add(node)
        waiting += [source for source, _ in node.next_functions]
    return False


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    return float(torch.stack([torch.sum(a * b, dtype=torch.float64) for a, b in zip(left, right, strict=True)]).sum())
