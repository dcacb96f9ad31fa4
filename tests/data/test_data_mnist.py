"""idx files are read to the value, compressed or not; damaged ones are named."""

import gzip
import struct

import numpy as np
import pytest
import torch
from official_data import idx_bytes, write_mnist

from lightning_easgd.lab.data import DataError, FashionMNISTDataModule, MNISTDataModule
from lightning_easgd.lab.data.idx import read_idx

pytestmark = pytest.mark.timeout(60)


@pytest.mark.parametrize("cls", [MNISTDataModule, FashionMNISTDataModule])
@pytest.mark.parametrize("compressed", [False, True])
def test_images_are_read_to_the_pixel(tmp_path, cls, compressed):
    arrays = write_mnist(tmp_path, cls.__name__.removesuffix("DataModule"), compressed=compressed)
    module = cls(root=tmp_path, mean=[0], std=[1], val_fraction=0.0)
    module.setup("fit")
    module.setup("test")
    for prefix, loader in (("train", module.train_dataloader()), ("t10k", module.test_dataloader())):
        images, labels = loader.dataset.__getitems__(range(40))
        assert ((images * 255).round().to(torch.uint8).numpy()[:, 0] == arrays[f"{prefix}-images-idx3-ubyte"]).all()
        assert (labels.numpy() == arrays[f"{prefix}-labels-idx1-ubyte"]).all()
    assert (module.image_shape, module.num_classes) == ((1, 28, 28), 10)


def test_a_file_is_preferred_to_its_compressed_twin(tmp_path):
    arrays = write_mnist(tmp_path)
    folder = tmp_path / "FashionMNIST" / "raw"
    (folder / "train-images-idx3-ubyte.gz").write_bytes(b"never opened")
    module = FashionMNISTDataModule(root=tmp_path, val_fraction=0.0)
    module.setup("fit")
    assert len(module.train_dataloader().dataset) == len(arrays["train-images-idx3-ubyte"])


VALUES = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)


def test_sizes_are_big_endian(tmp_path):
    (tmp_path / "file").write_bytes(bytes.fromhex("00000803 00000002 00000003 00000004") + bytes(range(24)))
    assert (read_idx(tmp_path / "file", 3) == VALUES).all()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "0 bytes are too few"),
        (idx_bytes(VALUES)[:15], "15 bytes are too few"),
        (idx_bytes(VALUES)[:-1], "23 bytes of data where the header's shape (2, 3, 4) needs 24"),
        (idx_bytes(VALUES) + b"x", "25 bytes of data"),
        (b"<html>not found</html>", "begins with 3c68746d"),
        (struct.pack(">HBB3I", 0, 0x0D, 3, 2, 3, 4) + bytes(96), "not as an idx file of unsigned bytes"),
        (idx_bytes(VALUES.reshape(2, 12)) + b"xx", "2 dimensions where 3 are expected"),
        (struct.pack(">HBB3I", 0, 8, 3, 2**31, 2**31, 2**31), "0 bytes of data"),
    ],
)
@pytest.mark.parametrize("compressed", [False, True])
def test_a_damaged_file_is_named(tmp_path, content, says, compressed):
    path = tmp_path / ("images.gz" if compressed else "images")
    path.write_bytes(gzip.compress(content) if compressed else content)
    with pytest.raises(DataError) as caught:
        read_idx(path, 3)
    assert str(path) in str(caught.value)
    assert says in str(caught.value)


@pytest.mark.parametrize("change", [lambda c: c[:-1], lambda c: c[:20], lambda c: b"", lambda c: b"PK" + c[2:]])
def test_a_damaged_gzip_file_is_named(tmp_path, change):
    path = tmp_path / "images.gz"
    path.write_bytes(change(gzip.compress(idx_bytes(VALUES))))
    with pytest.raises(DataError, match=r"images\.gz: (this gzip file cannot be read|0 bytes are too few)"):
        read_idx(path, 3)


def test_a_flipped_bit_in_a_gzip_file_is_named(tmp_path):
    content = bytearray(gzip.compress(idx_bytes(VALUES)))
    content[-12] ^= 1
    (tmp_path / "images.gz").write_bytes(content)
    with pytest.raises(DataError, match="this gzip file cannot be read"):
        read_idx(tmp_path / "images.gz", 3)


@pytest.mark.parametrize(
    ("file", "values", "says"),
    [
        ("train-labels-idx1-ubyte", np.zeros(39, np.uint8), "40 images and 39 labels"),
        ("train-images-idx3-ubyte", np.zeros((40, 32, 32), np.uint8), r"shape \(1, 32, 32\) where \(1, 28, 28\)"),
        ("train-labels-idx1-ubyte", np.full(40, 11, np.uint8), "the label 11; Fashion-MNIST has 10 classes"),
        ("train-labels-idx1-ubyte", np.zeros(40, np.uint8), "images of 1 classes"),
    ],
)
def test_files_that_do_not_fit_are_named(tmp_path, file, values, says):
    write_mnist(tmp_path)
    (tmp_path / "FashionMNIST" / "raw" / file).write_bytes(idx_bytes(values))
    with pytest.raises(DataError, match=f"FashionMNISTDataModule: the training set has .*{says}"):
        FashionMNISTDataModule(root=tmp_path).setup("fit")


def test_an_empty_set_is_named(tmp_path):
    write_mnist(tmp_path, count=0)
    with pytest.raises(DataError, match="0 images and 0 labels"):
        FashionMNISTDataModule(root=tmp_path).setup("fit")


def test_a_missing_file_says_what_to_do(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "FashionMNIST" / "raw" / "t10k-labels-idx1-ubyte").unlink()
    module = FashionMNISTDataModule(root=tmp_path)
    module.setup("fit")
    for step in (module.prepare_data, lambda: module.setup("test")):
        with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte: there is no such file.*download=true"):
            step()
