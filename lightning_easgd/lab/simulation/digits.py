"""scikit-learn's digits as a problem for simulated workers."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_easgd.lab.simulation.networks import ClassificationProblem

__all__ = ["digits_network", "digits_problem"]


def digits_network(seed: int = 0, hidden: int = 32) -> nn.Sequential:
    """A perceptron for 8x8 images with one hidden layer; 2410 parameters for 32 hidden units."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))


def digits_problem(network: nn.Module, *, batch_size: int = 32, seed: int = 0) -> ClassificationProblem:
    """The digits as ``DigitsDataModule(sampling="full")`` splits them and hands them out to real workers.

    A simulated worker and the real worker of the same rank and seed see the same batches. The error is that of the
    test set. The network maps images of shape (N, 1, 8, 8) to 10 logits; the seed is that of the order of the images.

    Raises:
        ModuleNotFoundError: If scikit-learn is missing.
    """
    # Reads what training reads, and with it Lightning, which the simulator itself does without.
    from lightning_easgd.lab.data.digits import DigitsDataModule  # noqa: PLC0415
    from lightning_easgd.lab.data.sampling import WorkerSampler  # noqa: PLC0415

    module = DigitsDataModule(batch_size, seed=seed)
    module.setup("fit")
    train = module.train_dataloader().dataset

    def order(worker: int, epoch: int) -> Tensor:
        sampler = WorkerSampler(train, worker, seed)
        sampler.set_epoch(epoch)
        return torch.tensor(list(sampler))

    inputs, labels = _everything(module.train_dataloader())
    return ClassificationProblem(
        network, inputs, labels, _everything(module.test_dataloader()), batch_size=batch_size, order=order
    )


def _everything(loader: DataLoader[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The whole data set of a loader, in the set's own order."""
    dataset: Any = loader.dataset  # map-style, hence iterable
    images, labels = zip(*dataset, strict=True)
    return torch.stack(images), torch.stack(labels)
