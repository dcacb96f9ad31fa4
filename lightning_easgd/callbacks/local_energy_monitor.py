"""How flat the training error is around the center and around each worker."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

from lightning_easgd.callbacks.recording import (
    ElasticStrategy,
    gather,
    number_of,
    own_weights,
    prepared,
    reached,
    write_csv,
)
from lightning_easgd.metrics import SIGMAS, Errors, LocalEnergy, misclassified
from lightning_easgd.strategies.trainer.strategy import TrainerStrategy
from lightning_easgd.strategies.worker_state import random_state, set_random_state
from lightning_easgd.transport.worker_layout import WorkerLayout

__all__ = ["LOCAL_ENERGY_FILE", "LocalEnergyMonitor"]

LOCAL_ENERGY_FILE = "local_energy.csv"
_COLUMNS = ("step", "weights", "sigma", "error", "energy", "deviation", "draws", "samples")


class LocalEnergyMonitor(Callback):
    r"""Measures the local energy :class:`~lightning_easgd.metrics.LocalEnergy` of what has been trained.

    .. math:: \delta E(\sigma) = \mathbb{E}_z\, E_{train}(w + \sigma z \odot w) - E_{train}(w)

    It is measured at the end of training, and if asked at the end of every n-th epoch, at the center and at each
    worker's own weights. The center, which is the same everywhere, is measured in equal parts by all ranks, and so is
    the one model of DDP. With other strategies that have no center, the model that training returns (rank 0's) takes
    its place.

    Noise and data are the same for all weights, ranks, runs and methods: the noise is that of ``seed``; the data are
    ``batches * batch_size`` samples evenly spaced over the training set (all of it if it is smaller), from the
    datamodule's ``train_evaluation_dataloader``, which returns them without augmentation, or where there is none from
    the set of the training loader, as it indexes them. Measuring changes nothing: weights, buffers and the state of
    all random number generators are bit for bit what they were.

    ============  =====================================================================================================
    column        meaning
    ============  =====================================================================================================
    ``step``      optimizer steps of rank 0
    ``weights``   "center" or "worker_<rank>"
    ``sigma``     σ
    ``error``     training error at w, the share of wrong answers in evaluation mode
    ``energy``    δE, mean of the draws
    ``deviation`` standard deviation of δE over the draws (of the population; 0 for one draw)
    ``draws``     number of draws of the noise
    ``samples``   number of training samples
    ============  =====================================================================================================

    Args:
        directory: Where `local_energy.csv` goes; None writes none and only logs.
        sigmas: σ ≥ 0, the strengths of the noise.
        draws: Draws of the noise.
        batches: The training samples are so many batches; None takes the whole training set.
        batch_size: Samples in a batch.
        workers: Measure each worker's own weights, too.
        every_n_epochs: Measure at the end of every n-th epoch, beside the end of training; None does not.
        seed: Seed of the noise.
        errors: Returns the sum of the errors of a batch and its number of samples.

    Raises:
        ValueError: If a number is not positive, or a σ is negative.
        TypeError: When it measures, if the training set has no length or no single loader.
    """

    def __init__(
        self,
        directory: str | Path | None = None,
        sigmas: Sequence[float] = SIGMAS,
        draws: int = 20,
        batches: int | None = 8,
        batch_size: int = 256,
        workers: bool = True,
        every_n_epochs: int | None = None,
        seed: int = 0,
        errors: Errors = misclassified,
    ) -> None:
        for name, value in (("batches", batches), ("batch_size", batch_size), ("every_n_epochs", every_n_epochs)):
            if value is not None and value < 1:
                raise ValueError(f"LocalEnergyMonitor({name}={value}): give 1 or more.")
        LocalEnergy(sigmas, draws)  # refuses what it cannot measure before training starts
        self.directory = directory
        self.sigmas = tuple(sigmas)
        self.draws = draws
        self.batches = batches
        self.batch_size = batch_size
        self.workers = workers
        self.every_n_epochs = every_n_epochs
        self.seed = seed
        self.errors = errors
        self.last_energies: dict[str, list[float]] = {}
        self._rows: list[list[Any]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        """Starts anew, so that a second `fit` does not repeat the rows of the first.

        Raises:
            TypeError: If the parameters are sharded.
        """
        if getattr(trainer.strategy, "is_sharded", False):
            raise TypeError(
                f"LocalEnergyMonitor(): {type(trainer.strategy).__name__} shards the parameters, and no rank can move"
                " them alone; measure with the checkpoint, on one device."
            )
        self._rows = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measures after every n-th epoch."""
        if self.every_n_epochs is not None and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._measure(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measures, unless the epoch that has just ended did."""
        measured = self._rows[-1][0] if self._rows else None
        # Rank 0's step counts: all have to agree on whether they measure once more.
        if trainer.strategy.broadcast(measured != trainer.global_step):
            self._measure(trainer, pl_module)

    def _measure(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        strategy, rank, world = trainer.strategy, trainer.global_rank, trainer.world_size
        has_center = isinstance(strategy, ElasticStrategy)
        alike = isinstance(strategy, DDPStrategy) and not isinstance(strategy, TrainerStrategy) and not has_center
        workers = self.workers and not alike and (has_center or world > 1)
        random = random_state(strategy.root_device)
        try:
            batches = self._training_batches(trainer)
            with strategy.center_weights() if isinstance(strategy, ElasticStrategy) else nullcontext():
                known = reached(trainer)
                every_other = slice(known.index(rank), None, len(known))
                part = batches[every_other] if has_center or alike else batches if rank == 0 else []
                model = self._sums(trainer, module, part)
            with own_weights(strategy):
                own = self._sums(trainer, module, batches if workers else [])
        finally:
            set_random_state(random, strategy.root_device)
        rows = torch.tensor(gather(trainer, [*model, *own]), dtype=torch.float64)
        total, each = rows[:, : len(model)].sum(dim=0), rows[:, len(model) :]
        every = {"center": total}
        if workers:
            layout = getattr(strategy, "layout", None) or WorkerLayout(world)
            every |= {
                f"worker_{number_of(trainer, i)}": each[ranks[0]]
                for i, ranks in enumerate(layout.inside)
                if ranks[0] in known
            }
        self._record(trainer, every)

    def _training_batches(self, trainer: L.Trainer) -> list[Any]:
        plain = getattr(getattr(trainer, "datamodule", None), "train_evaluation_dataloader", None)
        loader = trainer.train_dataloader if plain is None else plain()
        if not isinstance(loader, DataLoader) or not hasattr(loader.dataset, "__len__"):
            raise TypeError(
                f"LocalEnergyMonitor(): it takes samples from all over the training set, and {type(loader).__name__} is"
                " no DataLoader of a set with a length; give the datamodule a method train_evaluation_dataloader that"
                " returns one."
            )
        available = len(loader.dataset)
        count = available if self.batches is None else min(available, self.batches * self.batch_size)
        spread = DataLoader(
            loader.dataset,
            batch_size=self.batch_size,
            sampler=[number * available // count for number in range(count)],
            collate_fn=loader.collate_fn,
        )
        return list(spread)

    def _sums(self, trainer: L.Trainer, module: L.LightningModule, batches: Sequence[Any]) -> list[float]:
        """Number of samples, errors at w, and errors for each σ and draw, over some batches."""
        # The ranks measure different batches or weights: what is summed over them is decided in `_measure`.
        energy = LocalEnergy(self.sigmas, self.draws, self.seed, self.errors, sync_on_compute=False)
        for batch in batches:
            given = prepared(trainer, batch)
            with trainer.precision_plugin.forward_context():
                energy.update(module, given)
        return [float(energy.samples), float(energy.clean), *energy.noisy.flatten().tolist()]

    def _record(self, trainer: L.Trainer, every: dict[str, torch.Tensor]) -> None:
        step = trainer.global_step
        self.last_energies = {}
        for name, sums in every.items():
            samples, clean = sums[:2].tolist()
            energies = (sums[2:].view(len(self.sigmas), self.draws) - clean) / samples
            means, deviations = energies.mean(dim=1).tolist(), energies.std(dim=1, unbiased=False).tolist()
            self.last_energies[name] = means
            self._rows += [
                [step, name, sigma, clean / samples, mean, deviation, self.draws, int(samples)]
                for sigma, mean, deviation in zip(self.sigmas, means, deviations, strict=True)
            ]
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            logger.log_metrics(
                {
                    f"local_energy/{name}_sigma_{sigma:g}": value
                    for name, energies in self.last_energies.items()
                    for sigma, value in zip(self.sigmas, energies, strict=True)
                },
                step=step,
            )
        if self.directory is not None:
            write_csv(Path(self.directory) / LOCAL_ENERGY_FILE, _COLUMNS, self._rows)
