"""CIFAR-10 and CIFAR-100, from the Python batches as a folder or as the archive that is downloaded.

A. Krizhevsky, *Learning multiple layers of features from tiny images*, 2009; https://www.cs.toronto.edu/~kriz/cifar.html
"""

import math
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import final

import numpy as np
from typing_extensions import override

from lightning_easgd.lab.data.crops import Images, RandomCropFlip
from lightning_easgd.lab.data.errors import DataError
from lightning_easgd.lab.data.images import ImageFacts, Split
from lightning_easgd.lab.data.in_memory import InMemoryDataModule, Labels, Source
from lightning_easgd.lab.data.official_files import OfficialFile, check_sums, fetch
from lightning_easgd.lab.data.pickles import read_pickle

_SITE = "https://www.cs.toronto.edu/~kriz"
_SHAPE = (3, 32, 32)


@final
class CIFARFiles:
    """Reads the Python batches, from the folder where it exists and else straight from the archive.

    A batch is a pickled dictionary with `data`, uint8 of shape (n, 3072): red, green, blue plane, each row by row; and
    a list of labels.

    Args:
        root: Folder that holds the folder or the archive.
        url: Folder of the download.
        folder: Name of the folder, in `root` and in the archive.
        archive: Name and MD5 sum of the archive.
        batches: For each split the names of its batches with their MD5 sums.
        label_key: Key of the labels in a batch.
    """

    def __init__(
        self,
        root: Path,
        url: str,
        *,
        folder: str,
        archive: tuple[str, str],
        batches: Mapping[Split, Mapping[str, str]],
        label_key: bytes,
    ) -> None:
        self.folder = root / folder
        self.archive = OfficialFile(root / archive[0], archive[1])
        self.url = f"{url.rstrip('/')}/{archive[0]}"
        self.batches = batches
        self.label_key = label_key

    def prepare(self, *, download: bool, verify: bool) -> None:
        """See :class:`Source`."""
        if download and not self.folder.is_dir():
            fetch(self.url, self.archive, verify=verify)
        check_sums(self._files(), verify=verify)

    def check(self) -> None:
        """See :class:`Source`."""
        self._files()

    def read(self, split: Split) -> tuple[Images, Labels]:
        """See :class:`Source`."""
        images, labels = zip(*self._batches(split), strict=True)
        return np.concatenate(images), np.concatenate(labels)

    def _files(self) -> list[OfficialFile]:
        """The files that are used."""
        if self.folder.is_dir():
            files = [
                OfficialFile(self.folder / name, md5) for part in self.batches.values() for name, md5 in part.items()
            ]
            missing = [file.path.name for file in files if not file.path.is_file()]
            if missing:
                raise DataError(
                    f"{self.folder}: there is no {', '.join(missing)}; remove the folder and get the data set again"
                )
            return files
        if not self.archive.path.is_file():
            raise DataError(
                f"{self.folder}: there is no such folder, and no {self.archive.path.name} beside it; set download=true,"
                " or root (data.root, paths.data or the environment variable EASGD_DATA) to where the data set lies"
            )
        return [self.archive]

    def _batches(self, split: Split) -> Iterator[tuple[Images, Labels]]:
        names = list(self.batches[split])
        if self._files() == [self.archive]:
            contents = _members(self.archive.path, [f"{self.folder.name}/{name}" for name in names])
        else:
            contents = {str(self.folder / name): (self.folder / name).read_bytes() for name in names}
        for source, content in contents.items():
            yield self._decode(source, read_pickle(content, source))

    def _decode(self, source: str, batch: object) -> tuple[Images, Labels]:
        if not isinstance(batch, dict):
            raise DataError(f"{source}: it holds a {type(batch).__name__}, not a batch of images")
        # Files that Python 3 has written have keys of text.
        entries = {key.encode() if isinstance(key, str) else key: value for key, value in batch.items()}
        absent = [key.decode() for key in (b"data", self.label_key) if key not in entries]
        if absent:
            raise DataError(f"{source}: a batch without {' and '.join(absent)}; is this the right data set?")
        data, labels = entries[b"data"], np.asarray(entries[self.label_key])
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (math.prod(_SHAPE),):
            kind = f"{data.dtype} of shape {data.shape}" if isinstance(data, np.ndarray) else type(data).__name__
            raise DataError(f"{source}: data is {kind}, where uint8 of shape (n, {math.prod(_SHAPE)}) is right")
        if labels.shape != (len(data),) or not np.issubdtype(labels.dtype, np.integer):
            raise DataError(f"{source}: {len(data)} images and labels of shape {labels.shape}, {labels.dtype}")
        return data.reshape(-1, *_SHAPE), labels.astype(np.int64)


def _members(archive: Path, names: list[str]) -> dict[str, bytes]:
    """The contents of some files of a compressed archive; nothing is extracted to disk."""
    contents = {}
    try:
        with tarfile.open(archive, "r:gz") as files:
            for member in files:
                name = member.name.removeprefix("./")
                stream = files.extractfile(member) if name in names else None
                if stream is not None:
                    contents[name] = stream.read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{archive}: this archive cannot be read ({error}); remove it and get it again") from error
    missing = [name for name in names if name not in contents]
    if missing:
        raise DataError(f"{archive}: there is no {', '.join(missing)} in this archive; remove it and get it again")
    return {f"{archive}:{name}": contents[name] for name in names}


class _CIFARDataModule(InMemoryDataModule):
    original_shape = _SHAPE
    default_transform = RandomCropFlip(28)


@final
class CIFAR10DataModule(_CIFARDataModule):
    """CIFAR-10: 50 000 training and 10 000 test images of 32x32 pixels, 10 classes.

    Mean and standard deviation are those of the training set's pixels.
    Arguments and errors are those of :class:`InMemoryDataModule`.
    """

    facts = ImageFacts("CIFAR-10", 3, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))
    classes = 10

    @override
    def make_source(self, root: Path, url: str | None) -> Source:
        return CIFARFiles(
            root,
            url or _SITE,
            folder="cifar-10-batches-py",
            archive=("cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"),
            batches={
                "train": {
                    "data_batch_1": "c99cafc152244af753f735de768cd75f",
                    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
                    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
                    "data_batch_4": "634d18415352ddfa80567beed471001a",
                    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
                },
                "test": {"test_batch": "40351d587109b95175f43aff81a1287e"},
            },
            label_key=b"labels",
        )


@final
class CIFAR100DataModule(_CIFARDataModule):
    """CIFAR-100: 50 000 training and 10 000 test images of 32x32 pixels, 100 ("fine") classes.

    Mean and standard deviation are those of the training set's pixels, as usually published.
    Arguments and errors are those of :class:`InMemoryDataModule`.
    """

    facts = ImageFacts("CIFAR-100", 3, mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762))
    classes = 100

    @override
    def make_source(self, root: Path, url: str | None) -> Source:
        return CIFARFiles(
            root,
            url or _SITE,
            folder="cifar-100-python",
            archive=("cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85"),
            batches={
                "train": {"train": "16019d7e3df5f24257cddd939b257f8d"},
                "test": {"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
            },
            label_key=b"fine_labels",
        )
