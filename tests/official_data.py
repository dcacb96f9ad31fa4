"""Small data sets in the official formats of the large ones, made by hand."""

import gzip
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np

CIFAR10_FOLDER, CIFAR100_FOLDER = "cifar-10-batches-py", "cifar-100-python"
CIFAR10_TRAIN = [f"data_batch_{number}" for number in range(1, 6)]


def cifar_images(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)


def python2_batch(data: np.ndarray, labels: list[int], label_key: str) -> bytes:
    """A batch as Python 2 pickled it: byte strings, and the opcodes of NumPy's first arrays."""

    def text(value: str) -> bytes:
        return b"U" + bytes([len(value)]) + value.encode()

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    raw = data.tobytes()
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + number(0) + b"\x85" + text("b") + b"\x87R("
        + number(1) + number(data.shape[0]) + number(data.shape[1]) + b"\x86cnumpy\ndtype\n" + text("u1") + number(0)
        + number(1) + b"\x87R(" + number(3) + text("|") + b"NNN" + number(-1) + number(-1) + number(0) + b"tb\x89T"
        + struct.pack("<I", len(raw)) + raw + b"tb"
    )  # fmt: skip
    items = text(label_key) + b"](" + b"".join(map(number, labels)) + b"e" + text("data") + array
    return b"\x80\x02}(" + items + b"u."


def cifar_batches(names: list[str], count: int, classes: int, label_key: str) -> dict[str, tuple[bytes, np.ndarray]]:
    """For each name a batch of `count` images, labelled 0, 1, … in turn, and its images."""
    batches = {}
    for seed, name in enumerate(names):
        images = cifar_images(count, seed)
        labels = [row % classes for row in range(count)]
        batches[name] = python2_batch(images.reshape(count, -1), labels, label_key), images
    return batches


def write_cifar10(root: Path, count: int = 20) -> dict[str, np.ndarray]:
    return _write_folder(root / CIFAR10_FOLDER, cifar_batches([*CIFAR10_TRAIN, "test_batch"], count, 10, "labels"))


def write_cifar100(root: Path, count: int = 200) -> dict[str, np.ndarray]:
    return _write_folder(root / CIFAR100_FOLDER, cifar_batches(["train", "test"], count, 100, "fine_labels"))


def _write_folder(folder: Path, batches: dict[str, tuple[bytes, np.ndarray]]) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True)
    for name, (content, _) in batches.items():
        (folder / name).write_bytes(content)
    return {name: images for name, (_, images) in batches.items()}


def pack(folder: Path, archive: Path) -> None:
    with tarfile.open(archive, "w:gz") as files:
        files.add(folder, folder.name)


def rewrite_batch(path: Path, entries: dict, protocol: int = 2) -> None:
    path.write_bytes(pickle.dumps(entries, protocol))


def idx_bytes(values: np.ndarray) -> bytes:
    return struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.tobytes()


def write_mnist(root: Path, name: str = "FashionMNIST", count: int = 40, compressed: bool = False) -> dict:
    """Writes the four files; returns their arrays by file name."""
    folder = root / name / "raw"
    folder.mkdir(parents=True)
    arrays = {}
    for seed, prefix in enumerate(("train", "t10k")):
        arrays[f"{prefix}-images-idx3-ubyte"] = np.random.default_rng(seed).integers(
            0, 256, (count, 28, 28), dtype=np.uint8
        )
        arrays[f"{prefix}-labels-idx1-ubyte"] = np.arange(count, dtype=np.uint8) % 10
    for file, values in arrays.items():
        if compressed:
            (folder / f"{file}.gz").write_bytes(gzip.compress(idx_bytes(values)))
        else:
            (folder / file).write_bytes(idx_bytes(values))
    return arrays


WNIDS = ["n01440764", "n01443537", "n02084071"]


def write_imagenet(root: Path, train: int = 4, val: int = 2, size: tuple[int, int] = (60, 40)) -> None:
    """Writes folders of three classes; the colour of an image tells its class."""
    for split, count in (("train", train), ("val", val)):
        for label, wnid in enumerate(WNIDS):
            (root / split / wnid).mkdir(parents=True)
            for number in range(count):
                write_jpeg(root / split / wnid / f"{wnid}_{number}.JPEG", label, size)


def write_jpeg(path: Path, label: int, size: tuple[int, int] = (60, 40)) -> None:
    from PIL import Image

    colour = [0, 0, 0]
    colour[label % 3] = 200
    Image.new("RGB", size, tuple(colour)).save(path, "JPEG", quality=95)
