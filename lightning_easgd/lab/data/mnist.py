"""MNIST and Fashion-MNIST, from their idx files, compressed or not.

Y. LeCun, C. Cortes, C. Burges, *The MNIST database of handwritten digits*; H. Xiao, K. Rasul, R. Vollgraf,
*Fashion-MNIST: a novel image dataset for benchmarking machine learning algorithms*, 2017.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np
from typing_extensions import override

from lightning_easgd.lab.data.crops import CenterCrop, Images
from lightning_easgd.lab.data.errors import DataError
from lightning_easgd.lab.data.idx import read_idx
from lightning_easgd.lab.data.images import ImageFacts, Split
from lightning_easgd.lab.data.in_memory import InMemoryDataModule, Labels, Source
from lightning_easgd.lab.data.official_files import OfficialFile, check_sums, fetch

_PREFIX: Mapping[Split, str] = {"train": "train", "test": "t10k"}


@final
@dataclass(frozen=True)
class IdxFiles:
    """Four idx files, each either as it is or compressed (`.gz`), as it is downloaded.

    Args:
        folder: Where they lie.
        url: Folder of the download.
        sums: MD5 sums by file name, of compressed files and, where known, of others.
    """

    folder: Path
    url: str
    sums: Mapping[str, str]

    def prepare(self, *, download: bool, verify: bool) -> None:
        """See :class:`Source`."""
        names = self._all_names()
        for name in names:
            if download and not (self.folder / name).exists():
                compressed = f"{name}.gz"
                fetch(f"{self.url.rstrip('/')}/{compressed}", self._file(self.folder / compressed), verify=verify)
        check_sums([self._file(self._find(name)) for name in names], verify=verify)

    def check(self) -> None:
        """See :class:`Source`."""
        for name in self._all_names():
            self._find(name)

    def read(self, split: Split) -> tuple[Images, Labels]:
        """See :class:`Source`."""
        images, labels = (self._find(name) for name in self._names(split))
        return read_idx(images, 3)[:, None], read_idx(labels, 1).astype(np.int64)

    def _all_names(self) -> list[str]:
        return [name for split in _PREFIX for name in self._names(split)]

    def _names(self, split: Split) -> tuple[str, str]:
        return f"{_PREFIX[split]}-images-idx3-ubyte", f"{_PREFIX[split]}-labels-idx1-ubyte"

    def _file(self, path: Path) -> OfficialFile:
        return OfficialFile(path, self.sums.get(path.name))

    def _find(self, name: str) -> Path:
        for path in (self.folder / name, self.folder / f"{name}.gz"):
            if path.is_file():
                return path
        raise DataError(
            f"{self.folder / name}: there is no such file, and no {name}.gz beside it; set download=true, or root "
            "(data.root, paths.data or the environment variable EASGD_DATA) to where the data set lies"
        )


class _MNISTDataModule(InMemoryDataModule):
    original_shape = (1, 28, 28)
    classes = 10
    default_transform = CenterCrop(28)


@final
class FashionMNISTDataModule(_MNISTDataModule):
    """Fashion-MNIST: 60 000 training and 10 000 test images of 28x28 pixels, 10 classes.

    Mean and standard deviation are those of the training set's pixels.
    Arguments and errors are those of :class:`InMemoryDataModule`.
    """

    facts = ImageFacts("Fashion-MNIST", 1, mean=(0.2860,), std=(0.3530,))

    @override
    def make_source(self, root: Path, url: str | None) -> Source:
        return IdxFiles(
            root / "FashionMNIST" / "raw",
            url or "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
            {
                "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
                "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
                "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
                "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
                "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
                "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
                "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
                "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
            },
        )


@final
class MNISTDataModule(_MNISTDataModule):
    """MNIST: 60 000 training and 10 000 test images of 28x28 pixels, 10 classes.

    Mean and standard deviation are those of the training set's pixels, as usually published. Only the compressed files
    have published checksums.
    Arguments and errors are those of :class:`InMemoryDataModule`.
    """

    facts = ImageFacts("MNIST", 1, mean=(0.1307,), std=(0.3081,))

    @override
    def make_source(self, root: Path, url: str | None) -> Source:
        return IdxFiles(
            root / "MNIST" / "raw",
            url or "https://ossci-datasets.s3.amazonaws.com/mnist",
            {
                "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
                "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
                "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
                "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
            },
        )
