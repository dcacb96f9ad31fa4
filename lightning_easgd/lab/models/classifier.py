"""Image classification as a `LightningModule`."""

from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeAlias

import lightning as L
import torch.nn.functional as F  # the name everyone knows it by
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

OptimizerFactory: TypeAlias = Callable[[Iterable[nn.Parameter]], Optimizer]
SchedulerFactory: TypeAlias = Callable[[Optimizer], LRScheduler]
Batch: TypeAlias = tuple[Tensor, Tensor] | list[Tensor]


class Classifier(L.LightningModule):
    """Trains a network with cross-entropy and logs loss and accuracy as `train/…`, `val/…`, `test/…`.

    Validation and test metrics are those of all ranks. Training metrics stay local to each rank: a collective
    there would make every worker wait for the slowest, which is what elastic averaging avoids.

    Args:
        network: Maps a batch of inputs to logits.
        optimizer: Called with the parameters, returns the optimizer (a class with its options bound, as
            `functools.partial(torch.optim.SGD, lr=0.1)`).
        scheduler: Called with the optimizer, returns the learning rate scheduler.
        num_classes: Number of classes.
        scheduler_interval: When the scheduler is stepped: after each "epoch" or each "step" of the optimizer.

    Raises:
        ValueError: If the network says that it has another `num_classes`, or there is no such interval.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory | None = None,
        num_classes: int = 10,
        scheduler_interval: Literal["epoch", "step"] = "epoch",
    ) -> None:
        super().__init__()
        if scheduler_interval not in ("epoch", "step"):
            raise ValueError(
                f"Classifier(scheduler_interval={scheduler_interval!r}): there is no such interval; choose 'epoch' or "
                "'step'."
            )
        if getattr(network, "num_classes", num_classes) != num_classes:
            raise ValueError(
                f"Classifier(num_classes={num_classes}): the network has {network.num_classes} classes; give both the "
                "same number."
            )
        self.network = network
        self.num_classes = num_classes
        self.make_optimizer = optimizer
        self.make_scheduler = scheduler
        self.scheduler_interval = scheduler_interval
        # Micro average: the share of correct answers, whatever the classes' sizes.
        self.train_accuracy = MulticlassAccuracy(num_classes, average="micro", sync_on_compute=False)
        self.val_metrics = _evaluation_metrics(num_classes)
        self.test_metrics = _evaluation_metrics(num_classes)

    def check_data(self, data: object) -> None:
        """Compare what the network is built for with what a data module offers.

        Networks and data modules that do not tell their `num_classes` or `image_shape` are not compared.

        Raises:
            ValueError: If the number of classes or the shape of the images differs.
        """
        for name, owner in (("num_classes", self), ("image_shape", self.network)):
            own, offered = getattr(owner, name, None), getattr(data, name, None)
            if own is not None and offered is not None and own != offered:
                raise ValueError(
                    f"Classifier({name}={own}): {type(data).__name__} has {name}={offered}; the model's value follows "
                    f"the data's unless it is set: leave model.{name} and model.network.{name} as they are."
                )

    @override
    def setup(self, stage: str) -> None:
        """Compare the network with the trainer's data module, before anything trains."""
        self.check_data(getattr(self.trainer, "datamodule", None))

    @override
    def configure_model(self) -> None:
        """Shard the network, layer by layer, where the strategy has a mesh of devices for that (`easgd_fsdp`)."""
        mesh = self.device_mesh
        if mesh is None:
            return
        from torch.distributed.fsdp import FSDPModule, fully_shard  # noqa: PLC0415 - it takes its time

        if isinstance(self.network, FSDPModule):
            return
        for part in (*self.network.children(), self.network):
            if any(True for _ in part.parameters()):
                fully_shard(part, mesh=mesh["data_parallel"])

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits of `inputs`."""
        logits: Tensor = self.network(inputs)
        return logits

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        inputs, targets = batch
        logits = self(inputs)
        loss = F.cross_entropy(logits, targets)
        self.train_accuracy(logits.detach(), targets)
        self.log("train/loss", loss, on_step=True, on_epoch=False, prog_bar=True)
        self.log("train/accuracy", self.train_accuracy, on_step=False, on_epoch=True)
        return loss

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Update the validation metrics with one batch."""
        self._evaluate("val", self.val_metrics, batch)

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Update the test metrics with one batch."""
        self._evaluate("test", self.test_metrics, batch)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimizer, and the scheduler where there is one."""
        optimizer = self.make_optimizer(self.parameters())
        if self.make_scheduler is None:
            return optimizer
        scheduler = self.make_scheduler(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": self.scheduler_interval}}

    def _evaluate(self, stage: str, metrics: MetricCollection, batch: Any) -> None:
        inputs, targets = batch
        logits = self(inputs)
        loss = F.cross_entropy(logits, targets, reduction="none")
        metrics["loss"].update(loss)
        metrics["accuracy"].update(logits, targets)
        self.log(f"{stage}/loss", metrics["loss"], batch_size=len(targets))
        self.log(f"{stage}/accuracy", metrics["accuracy"], batch_size=len(targets), prog_bar=True)


def _evaluation_metrics(num_classes: int) -> MetricCollection:
    return MetricCollection(
        {"loss": MeanMetric(), "accuracy": MulticlassAccuracy(num_classes, average="micro")},
        compute_groups=False,
    )
