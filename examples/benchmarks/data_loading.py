"""How many images a second the loaders deliver: batched augmentation in memory, and JPEG files.

    python examples/benchmarks/data_loading.py

Small images (random bytes of CIFAR's size: the cost does not depend on what they show) are cropped, flipped and
normalised by this package's batched operations and, for comparison, one at a time with the same arithmetic and
DataLoader's own collation, as is usual. JPEG files of ImageNet's average size (500x375, smooth noise) are decoded and
cropped in 0, 1 and more loader processes. The ways take turns, round after round; printed is the median over the
rounds of images per second, and of the ratio to the first way of the same round, with the smallest and the largest.
"""

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from lightning_easgd.lab.data import PadCropFlip, RandomCropFlip, RandomResizedCropFlip, ShortSideRandomCropFlip
from lightning_easgd.lab.data.crops import BatchCrop
from lightning_easgd.lab.data.image_folders import ImageFiles
from lightning_easgd.lab.data.images import Normalise
from lightning_easgd.lab.data.in_memory import ImageBatches
from lightning_easgd.lab.data.sampling import augmenting_loader, keep_batch

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class OneByOne(Dataset[Any]):
    """The usual way: each image is cropped, flipped and normalised alone."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, size: int, padding: int) -> None:
        self.images, self.labels = images, labels
        self.size, self.padding = size, padding
        self.mean, self.std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        image = self.images[row]
        if self.padding:
            image = torch.nn.functional.pad(image, (self.padding,) * 4)
        choices = image.shape[1] - self.size + 1
        top, left = random.randrange(choices), random.randrange(choices)
        image = image[:, top : top + self.size, left : left + self.size]
        if random.random() < 0.5:
            image = image.flip(2)
        return (image.float() / 255 - self.mean) / self.std, self.labels[row]


def rate(loader: Iterable[Any]) -> float:
    """Images per second of one epoch."""
    begin, count = time.perf_counter(), 0
    for _, labels in loader:
        count += len(labels)
    return count / (time.perf_counter() - begin)


def compare(title: str, ways: dict[str, Callable[[], Iterable[Any]]], rounds: int) -> None:
    """Prints images per second of each way, and its ratio to the first."""
    loaders = {name: make() for name, make in ways.items()}
    for loader in loaders.values():
        next(iter(loader))  # processes start, caches fill
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, loader in loaders.items():
            rates[name].append(rate(loader))
    first = next(iter(rates.values()))
    print(title)
    for name, values in rates.items():
        ratios = [value / base for value, base in zip(values, first, strict=True)]
        print(
            f"  {name:<34}{statistics.median(values):>10.0f} images/s   {statistics.median(ratios):6.2f}"
            f"  ({min(ratios):.2f} to {max(ratios):.2f})"
        )


def small_images(count: int, rounds: int, batch_size: int) -> None:
    """Compares the ways for images in memory."""
    images = np.random.default_rng(0).integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
    labels = np.arange(count) % 10

    def batched(crop: BatchCrop, processes: int) -> DataLoader[Any]:
        data = ImageBatches(images, labels, np.arange(count), crop, Normalise(MEAN, STD))
        return augmenting_loader(
            data, batch_size=batch_size, sampling="full", rank=0, shares={}, seed=0, num_workers=processes,
            collate_fn=keep_batch,
        )  # fmt: skip

    def one_by_one(size: int, padding: int, processes: int) -> DataLoader[Any]:
        data = OneByOne(torch.from_numpy(images), torch.from_numpy(labels), size, padding)
        return DataLoader(
            data, batch_size=batch_size, shuffle=True, num_workers=processes, persistent_workers=processes > 0
        )

    crops: tuple[tuple[str, BatchCrop, int, int], ...] = (
        ("the paper's crop, 28x28", RandomCropFlip(28), 28, 0),
        ("padded crop, 32x32", PadCropFlip(32, 4), 32, 4),
    )
    for title, crop, size, padding in crops:
        ways = {
            "one by one": lambda: one_by_one(size, padding, 0),  # noqa: B023  # called within this round
            "one by one, 2 processes": lambda: one_by_one(size, padding, 2),  # noqa: B023
            "batched": lambda: batched(crop, 0),  # noqa: B023
            "batched, 2 processes": lambda: batched(crop, 2),  # noqa: B023
        }
        compare(f"{count} images of 32x32 in memory, {title}, batches of {batch_size}", ways, rounds)


def jpeg_files(folder: Path, count: int, rounds: int) -> None:
    """Compares numbers of loader processes for JPEG files."""
    from PIL import Image  # noqa: PLC0415

    generator = np.random.default_rng(0)
    names = [f"{number}.JPEG" for number in range(count)]
    for name in names:
        coarse = Image.fromarray(generator.integers(0, 256, (38, 50, 3), dtype=np.uint8))
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(folder / name, "JPEG", quality=90)
    for title, crop in (
        ("short side 256, crop 221x221", ShortSideRandomCropFlip(221)),
        ("part resized to 224x224", RandomResizedCropFlip(224)),
    ):

        def loader(processes: int) -> DataLoader[Any]:
            data = ImageFiles(folder, names, np.zeros(count, np.int64), crop)  # noqa: B023
            return augmenting_loader(
                data, batch_size=32, sampling="full", rank=0, shares={}, seed=0, num_workers=processes,
                collate_fn=data.collate(Normalise(MEAN, STD)),
            )  # fmt: skip

        ways = {f"{processes} loader processes": lambda n=processes: loader(n) for processes in (0, 1, 2)}
        compare(f"{count} JPEG files of 500x375, {title}", ways, rounds)


def main() -> None:
    """Reads the arguments and compares."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=20_000, help="small images in memory")
    parser.add_argument("--files", type=int, default=256, help="JPEG files; 0 leaves them out")
    parser.add_argument("--batch-size", type=int, default=128, help="small images in a batch")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    small_images(arguments.images, arguments.rounds, arguments.batch_size)
    if arguments.files:
        with tempfile.TemporaryDirectory() as folder:
            jpeg_files(Path(folder), arguments.files, arguments.rounds)


if __name__ == "__main__":
    main()
