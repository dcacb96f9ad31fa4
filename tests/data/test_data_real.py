"""The real CIFAR-10 and Fashion-MNIST, where the environment variable EASGD_DATA names a folder that holds them."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from application import quiet_trainer

from lightning_easgd.lab.data import CIFAR10DataModule, FashionMNISTDataModule

ROOT = Path(os.environ.get("EASGD_DATA", "nowhere"))
pytestmark = pytest.mark.timeout(120)


def real(cls, folder: str, **arguments):
    if not (ROOT / folder).is_dir():
        pytest.skip(f"EASGD_DATA names no folder that holds {folder}")
    return cls(root=ROOT, **arguments)


def size_of(cls) -> int:
    return cls.original_shape[1] * cls.original_shape[2]


SETS = pytest.mark.parametrize(
    ("cls", "folder", "count"),
    [(CIFAR10DataModule, "cifar-10-batches-py", 50_000), (FashionMNISTDataModule, "FashionMNIST/raw", 60_000)],
)


@SETS
def test_published_checksums_sizes_and_statistics(cls, folder, count):
    module = real(cls, folder, val_fraction=0.0)
    module.prepare_data()
    module.setup("fit")
    module.setup("test")
    for split, size in (("train", count), ("test", 10_000)):
        images, labels = module._images(split)
        assert images.shape == (size, *cls.original_shape)
        assert np.bincount(labels).tolist() == [size // 10] * 10
    for channel, (mean, std) in enumerate(zip(cls.facts.mean, cls.facts.std, strict=True)):
        shares = np.bincount(module._images("train")[0][:, channel].ravel(), minlength=256) / (count * size_of(cls))
        values = np.arange(256) / 255
        assert shares @ values == pytest.approx(mean, abs=6e-5)
        assert np.sqrt(shares @ (values - mean) ** 2) == pytest.approx(std, abs=6e-5)


def test_known_pixels_of_cifar10():
    module = real(CIFAR10DataModule, "cifar-10-batches-py")
    images, labels = module._images("train")
    # The first image, a frog (6): its first pixel in red, green, blue, and its last.
    assert labels[:5].tolist() == [6, 9, 9, 4, 1]
    assert images[0, :, 0, 0].tolist() == [59, 62, 63]
    assert images[0, :, 31, 31].tolist() == [123, 92, 72]


def test_known_pixels_of_fashion_mnist():
    module = real(FashionMNISTDataModule, "FashionMNIST/raw")
    images, labels = module._images("train")
    assert labels[:5].tolist() == [9, 0, 0, 3, 0]  # an ankle boot first
    assert images[0, 0, :3].sum() == 0
    assert images[0, 0].sum() == 76247


@SETS
def test_an_epoch_has_each_training_image_once(cls, folder, count):
    module = real(cls, folder)
    module.setup("fit")
    loader = module.train_dataloader()
    labels = torch.cat([labels for _, labels in loader])
    assert torch.bincount(labels).tolist() == [round(0.09 * count)] * 10
    assert sorted(key % len(loader.dataset) for key in loader.sampler) == list(range(round(0.9 * count)))


def test_the_strided_network_learns_cifar10():
    import functools

    from lightning_easgd.lab.models import Classifier, StridedNet

    torch.manual_seed(0)
    optimizer = functools.partial(torch.optim.SGD, lr=0.02, momentum=0.9, nesterov=True)
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(
        Classifier(StridedNet(), optimizer), datamodule=real(CIFAR10DataModule, "cifar-10-batches-py", batch_size=32)
    )
    assert trainer.callback_metrics["val/accuracy"] > 0.45
