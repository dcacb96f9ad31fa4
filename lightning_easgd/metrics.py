"""How flat the loss is around a point: the local energy, as a metric."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias, final

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from typing_extensions import override

from lightning_easgd.tensors.buffers import keep_buffers, restore_buffers

__all__ = ["SIGMAS", "Errors", "LocalEnergy", "misclassified"]

Errors: TypeAlias = Callable[[nn.Module, Any], tuple[Tensor, int]]

SIGMAS = tuple(step / 100 for step in range(1, 11))
"""σ from 0.01 to 0.1: the noise of Pittorino et al.; at σ = 0 the local energy is 0."""


def misclassified(module: nn.Module, batch: Any) -> tuple[Tensor, int]:
    """Counts the wrong answers to a batch of (inputs, targets).

    Args:
        module: Maps inputs to logits of shape (N, classes).
        batch: Inputs, and int64 targets of shape (N,).

    Returns:
        The number of wrong answers and the number of samples.
    """
    inputs, targets = batch
    return (module(inputs).argmax(dim=-1) != targets).sum(), len(targets)


@final
class LocalEnergy(Metric):
    r"""Increase of the error under multiplicative Gaussian noise of the weights: small where a minimum is wide.

    .. math:: \delta E(w, \sigma) = \mathbb{E}_z\, E(w + \sigma z \odot w) - E(w), \qquad z \sim N(0, I)

    (Pittorino et al., *Entropic gradient descent algorithms and wide flat minima*, ICLR 2021, arXiv:2006.07897; E is
    the training error there.) The noise is relative to each weight, as scaling the layers of a network up and down
    leaves its function, and this measure of it, what it was.

    All parameters are perturbed, buffers are not, and the module is in evaluation mode. The noise is that of a
    generator of the metric's own, on the CPU in float32: it depends on ``seed``, on the number of the draw and on the
    parameters' shapes only, and is the same for each σ and each batch, so that what is compared is compared under the
    same noise. No other random number generator is touched. After :meth:`update`, and after an error in it, parameters
    and buffers are bit for bit what they were.

    An update takes ``draws * len(sigmas) + 1`` forward passes and one more copy of the parameters and of the noise.

    Args:
        sigmas: σ ≥ 0, the strengths of the noise.
        draws: z is drawn so many times.
        seed: Seed of the noise.
        errors: Returns the sum of the errors of a batch and its number of samples.
        **metric: Arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If there is no σ, one is negative or not finite, or ``draws`` < 1.

    Example:
        >>> energy = LocalEnergy(sigmas=(0.05, 0.1), draws=5)
        >>> module = nn.Linear(3, 2)
        >>> energy.update(module, (torch.ones(4, 3), torch.zeros(4, dtype=torch.int64)))
        >>> energy.compute().shape
        torch.Size([2])
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    clean: Tensor
    noisy: Tensor
    samples: Tensor

    def __init__(
        self,
        sigmas: Sequence[float] = SIGMAS,
        draws: int = 20,
        seed: int = 0,
        errors: Errors = misclassified,
        **metric: Any,
    ) -> None:
        super().__init__(**metric)
        if not sigmas or not all(0 <= sigma < math.inf for sigma in sigmas):
            raise ValueError(
                f"LocalEnergy(sigmas={list(sigmas)}): strengths of noise are finite and not negative; give one or more,"
                " such as 0.05."
            )
        if draws < 1:
            raise ValueError(f"LocalEnergy(draws={draws}): the mean over the noise needs a draw; give 1 or more.")
        self.sigmas = tuple(float(sigma) for sigma in sigmas)
        self.draws = draws
        self.seed = seed
        self.errors = errors
        # Sums in float64: exact for counts, whatever their number.
        self.add_state("clean", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("noisy", torch.zeros(len(sigmas), draws, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("samples", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    @override
    def update(self, module: nn.Module, batch: Any) -> None:
        """Adds a batch.

        Args:
            module: The network, with the weights w.
            batch: On the module's device; what ``errors`` takes.
        """
        with torch.no_grad(), _put_back(module) as weights:
            clean, samples = self.errors(module, batch)
            parameters: list[Tensor] = list(module.parameters())
            generator = torch.Generator().manual_seed(self.seed)
            noisy = torch.zeros_like(self.noisy)
            for draw in range(self.draws):
                # σ z ⊙ w in float32 for narrower weights: bfloat16 would round the noise to a few steps.
                noise = [
                    torch.randn(weight.shape, generator=generator).to(weight.device) * weight for weight in weights
                ]
                for row, sigma in enumerate(self.sigmas):
                    torch._foreach_copy_(parameters, torch._foreach_add(weights, noise, alpha=sigma))
                    noisy[row, draw] = self.errors(module, batch)[0]
        self.clean += clean.to(self.clean)
        self.noisy += noisy
        self.samples += samples

    @override
    def compute(self) -> Tensor:
        """The mean of δE over the draws for each σ: float64 of shape (len(sigmas),)."""
        return self.by_draw().mean(dim=1)

    def by_draw(self) -> Tensor:
        """δE of what this process has seen, for each σ and draw: float64 of shape (len(sigmas), draws)."""
        return (self.noisy - self.clean) / self.samples

    def error(self) -> Tensor:
        """E(w) of what this process has seen: float64 without dimensions."""
        return self.clean / self.samples


@contextlib.contextmanager
def _put_back(module: nn.Module) -> Iterator[list[Tensor]]:
    """Context in evaluation mode, after which parameters, buffers and modes are what they were; gives the parameters.

    They are copies of float32 or wider.
    """
    training = [(each, each.training) for each in module.modules()]
    parameters = list(module.parameters())
    values = [parameter.detach().clone() for parameter in parameters]
    buffers = keep_buffers(module)
    module.eval()
    try:
        yield [value.to(torch.promote_types(value.dtype, torch.float32)) for value in values]
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, values, strict=True):
                parameter.copy_(value)
        restore_buffers(buffers)
        for each, mode in training:
            each.training = mode
