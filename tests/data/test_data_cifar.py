"""CIFAR's batches are read to the pixel from folder and archive; damaged ones are named."""

import os
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from official_data import (
    CIFAR10_FOLDER,
    CIFAR10_TRAIN,
    cifar_images,
    pack,
    python2_batch,
    rewrite_batch,
    write_cifar10,
    write_cifar100,
)

from lightning_easgd.lab.data import CenterCrop, CIFAR10DataModule, CIFAR100DataModule, DataError, PadCropFlip
from lightning_easgd.lab.data.pickles import read_pickle

pytestmark = pytest.mark.timeout(60)


def plain(cls=CIFAR10DataModule, **arguments):
    """No augmentation and no normalisation: what comes out are the pixels, in [0, 1]."""
    defaults = {
        "train_transform": CenterCrop(32), "eval_transform": CenterCrop(32), "mean": [0] * 3, "std": [1] * 3,
        "val_fraction": 0.0,
    }  # fmt: skip
    return cls(**(defaults | arguments))


def pixels(loader) -> tuple[np.ndarray, list[int]]:
    """All images of a loader as bytes, in the order of the rows."""
    images, labels = loader.dataset.__getitems__(range(len(loader.dataset)))
    return (images * 255).round().to(torch.uint8).numpy(), labels.tolist()


@pytest.mark.parametrize("packed", [False, True])
def test_cifar10_is_read_to_the_pixel(tmp_path, packed):
    images = write_cifar10(tmp_path)
    if packed:
        pack(tmp_path / CIFAR10_FOLDER, tmp_path / "cifar-10-python.tar.gz")
        (tmp_path / CIFAR10_FOLDER).rename(tmp_path / "elsewhere")
    module = plain(root=tmp_path)
    module.setup("fit")
    module.setup("test")
    train, labels = pixels(module.train_dataloader())
    assert (train == np.concatenate([images[name] for name in CIFAR10_TRAIN])).all()
    assert labels == [row % 10 for row in range(20)] * 5
    test, labels = pixels(module.test_dataloader())
    assert (test == images["test_batch"]).all()
    assert labels == [row % 10 for row in range(20)]


@pytest.mark.parametrize("packed", [False, True])
def test_cifar100_is_read_to_the_pixel_with_fine_labels(tmp_path, packed):
    images = write_cifar100(tmp_path)
    if packed:
        pack(tmp_path / "cifar-100-python", tmp_path / "cifar-100-python.tar.gz")
        (tmp_path / "cifar-100-python").rename(tmp_path / "elsewhere")
    module = plain(CIFAR100DataModule, root=tmp_path)
    module.setup("fit")
    train, labels = pixels(module.train_dataloader())
    assert (train == images["train"]).all()
    assert labels == [row % 100 for row in range(200)]


@pytest.mark.parametrize("protocol", range(2, 6))
def test_batches_written_by_python_3_are_read_too(tmp_path, protocol):
    write_cifar10(tmp_path)
    data = cifar_images(20, 7)
    entries = {"data": data.reshape(20, -1), "labels": [row % 10 for row in range(20)]}
    rewrite_batch(tmp_path / CIFAR10_FOLDER / "test_batch", entries, protocol)
    module = plain(root=tmp_path)
    module.setup("test")
    assert (pixels(module.test_dataloader())[0] == data).all()


def test_held_out_images_are_apart_alike_everywhere_and_of_each_class(tmp_path):
    write_cifar10(tmp_path)
    first = plain(root=tmp_path, val_fraction=0.2)
    second = plain(root=tmp_path, val_fraction=0.2, seed=5)
    for module in (first, second):
        module.setup("fit")
    train, labels = pixels(first.train_dataloader())
    val, val_labels = pixels(first.val_dataloader())
    assert np.bincount(labels).tolist() == [8] * 10
    assert np.bincount(val_labels).tolist() == [2] * 10
    assert len({image.tobytes() for image in np.concatenate([train, val])}) == 100
    assert (val == pixels(second.val_dataloader())[0]).all()


def test_a_fraction_that_holds_out_nothing_is_refused(tmp_path):
    write_cifar100(tmp_path)
    module = CIFAR100DataModule(root=tmp_path, val_fraction=0.1)
    module.setup("fit")
    with pytest.raises(ValueError, match=r"val_fraction=0\.1\): of 200 training images it holds out 0"):
        module.train_dataloader()


def test_without_held_out_images_validation_is_the_test_set(tmp_path):
    images = write_cifar10(tmp_path)
    module = plain(root=tmp_path)
    module.setup("fit")
    assert (pixels(module.val_dataloader())[0] == images["test_batch"]).all()


@pytest.mark.parametrize("cls", [CIFAR10DataModule, CIFAR100DataModule])
def test_default_batches_are_the_papers(tmp_path, cls):
    (write_cifar10 if cls is CIFAR10DataModule else write_cifar100)(tmp_path)
    module = cls(root=tmp_path, batch_size=16, val_fraction=0.5)
    module.setup("fit")
    assert (module.image_shape, module.num_classes) == ((3, 28, 28), 10 if cls is CIFAR10DataModule else 100)
    for loader in (module.train_dataloader(), module.val_dataloader()):
        images, labels = next(iter(loader))
        assert images.shape[1:] == module.image_shape
        assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    standard = cls(root=tmp_path, train_transform=PadCropFlip(32), eval_transform=CenterCrop(32))
    assert standard.image_shape == (3, 32, 32)


def on_rank(module, rank, shares=None):
    shares = shares or {"num_replicas": 2, "rank": rank}
    module.trainer = SimpleNamespace(global_rank=rank, world_size=2, strategy=None, distributed_sampler_kwargs=shares)
    module.setup("fit")
    return module


def batches_of(root, rank=0, epoch=0, **arguments):
    module = on_rank(CIFAR10DataModule(root=root, batch_size=8, **arguments), rank)
    loader = module.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)


@pytest.mark.processes
def test_augmentation_follows_seed_rank_and_epoch_and_not_the_processes(tmp_path):
    write_cifar10(tmp_path)
    reference = batches_of(tmp_path)
    for other in (batches_of(tmp_path), batches_of(tmp_path, num_workers=2)):
        assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(reference, other, strict=True))

    def by_content(batches):  # crops differ although the images are the same ones
        return {image.numpy().tobytes() for images, _ in batches for image in images}

    for other in ({"rank": 1}, {"epoch": 1}, {"seed": 1}):
        shared = by_content(reference) & by_content(batches_of(tmp_path, **other))
        assert len(shared) < 10, other  # 1 in 50 crops is the same by chance


@pytest.mark.processes
def test_a_second_epoch_in_living_loader_processes_is_augmented_anew(tmp_path):
    write_cifar10(tmp_path)
    module = CIFAR10DataModule(root=tmp_path, num_workers=1)
    module.setup("fit")
    loader = module.train_dataloader()
    sums = []
    for epoch in (0, 1, 0):
        loader.sampler.set_epoch(epoch)
        sums.append(torch.cat([images.sum((1, 2, 3)) for images, _ in loader]).double().sum().item())
    assert sums[0] != sums[1]
    assert sums[0] == sums[2]


def test_sharded_workers_have_disjoint_parts_and_full_ones_all(tmp_path):
    write_cifar10(tmp_path)

    def seen(rank, sampling, shares=None):
        module = on_rank(plain(root=tmp_path, sampling=sampling), rank, shares)
        return {image.numpy().tobytes() for images, _ in module.train_dataloader() for image in images}

    first, second = seen(0, "sharded"), seen(1, "sharded")
    assert len(first) == len(second) == 50
    assert not first & second
    assert seen(0, "full") == seen(1, "full") == seen(0, "dynamic") == first | second
    of_four = [seen(0, "sharded", {"num_replicas": 4, "rank": rank}) for rank in range(4)]  # as the strategy says
    assert [len(part) for part in of_four] == [25] * 4
    assert set().union(*of_four) == first | second


def damaged(root, name, change):
    path = root / CIFAR10_FOLDER / name
    path.write_bytes(change(path.read_bytes()))
    module = CIFAR10DataModule(root=root)
    with pytest.raises(DataError) as caught:
        module.setup("fit")
    assert name in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("length", [0, 1, 100, 30_000, -1])
def test_a_truncated_pickle_is_named(tmp_path, length):
    write_cifar10(tmp_path)
    message = damaged(tmp_path, "data_batch_3", lambda content: content[:length])
    assert "cannot be read" in message


def test_random_bytes_are_named(tmp_path):
    write_cifar10(tmp_path)
    generator = np.random.default_rng(0)
    for _ in range(20):
        assert "data_batch_1" in damaged(tmp_path, "data_batch_1", lambda _: generator.bytes(500))


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ([1, 2], "a list, not a batch"),
        ({b"labels": [0]}, "without data"),
        ({b"data": np.zeros((2, 3072), np.uint8)}, "without labels"),
        ({b"data": np.zeros((2, 3072), np.float32), b"labels": [0, 1]}, "float32 of shape"),
        ({b"data": np.zeros((2, 3000), np.uint8), b"labels": [0, 1]}, "where uint8 of shape (n, 3072)"),
        ({b"data": "text", b"labels": [0, 1]}, "data is str"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0]}, "2 images and labels of shape (1,)"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0.5, 1.0]}, "float64"),
    ],
)
def test_other_contents_are_named(tmp_path, entries, says):
    write_cifar10(tmp_path)
    assert says in damaged(tmp_path, "data_batch_2", lambda _: pickle.dumps(entries, 2))


class _Harmful:
    def __reduce__(self):
        return os.system, ("touch harmed",)


def test_a_pickle_that_runs_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_cifar10(tmp_path)
    message = damaged(tmp_path, "data_batch_1", lambda _: pickle.dumps({b"data": _Harmful()}))
    assert "system" in message
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(np.array([None, 1], object), 2),
        b"c_codecs\nencode\nX\x01\x00\x00\x00aX\x04\x00\x00\x00zlib\x86R.",
        b"cbuiltins\neval\nX\x03\x00\x00\x001+1\x85R.",
        b"cnumpy.core.multiarray\n_reconstruct.__globals__\n.",
    ],
    ids=["objects", "codec", "eval", "attribute"],
)
def test_pickles_hold_arrays_and_primitives_only(content):
    with pytest.raises(DataError, match="cannot be read"):
        read_pickle(content, "here")


def relabelled(root, label):
    write_cifar10(root)
    labels = [label] + [row % 10 for row in range(1, 20)]
    content = python2_batch(cifar_images(20, 0).reshape(20, -1), labels, "labels")
    (root / CIFAR10_FOLDER / "data_batch_1").write_bytes(content)
    return CIFAR10DataModule(root=root)


@pytest.mark.parametrize("label", [10, 250, -1])
def test_a_label_of_no_class_is_named(tmp_path, label):
    with pytest.raises(DataError, match=rf"training set has the label {label}; CIFAR-10 has 10 classes"):
        relabelled(tmp_path, label).setup("fit")


def test_too_few_classes_are_named(tmp_path):
    write_cifar10(tmp_path)
    for name in CIFAR10_TRAIN:
        content = python2_batch(cifar_images(20, 0).reshape(20, -1), [row % 7 for row in range(20)], "labels")
        (tmp_path / CIFAR10_FOLDER / name).write_bytes(content)
    with pytest.raises(DataError, match="images of 7 classes; CIFAR-10 has 10"):
        CIFAR10DataModule(root=tmp_path).setup("fit")


def test_missing_data_say_what_to_do(tmp_path):
    module = CIFAR10DataModule(root=tmp_path / "nowhere")
    for step in (module.prepare_data, lambda: module.setup("fit")):
        with pytest.raises(DataError, match=r"nowhere.*download=true.*EASGD_DATA"):
            step()
    assert not (tmp_path / "nowhere").exists()


def test_a_missing_batch_is_named(tmp_path):
    write_cifar10(tmp_path)
    (tmp_path / CIFAR10_FOLDER / "data_batch_4").unlink()
    with pytest.raises(DataError, match="there is no data_batch_4"):
        CIFAR10DataModule(root=tmp_path).setup("fit")


@pytest.mark.parametrize("cut", [0.0, 0.3, 0.99])
def test_a_torn_archive_is_named(tmp_path, cut):
    write_cifar10(tmp_path)
    archive = tmp_path / "cifar-10-python.tar.gz"
    pack(tmp_path / CIFAR10_FOLDER, archive)
    (tmp_path / CIFAR10_FOLDER).rename(tmp_path / "elsewhere")
    content = archive.read_bytes()
    archive.write_bytes(content[: int(cut * len(content))])
    with pytest.raises(DataError, match=r"cifar-10-python\.tar\.gz: (this archive cannot be read|there is no)"):
        CIFAR10DataModule(root=tmp_path).setup("fit")


def test_an_archive_of_something_else_is_named(tmp_path):
    write_cifar10(tmp_path)
    pack(tmp_path / CIFAR10_FOLDER, tmp_path / "cifar-100-python.tar.gz")
    with pytest.raises(DataError, match=r"there is no cifar-100-python/train in this archive"):
        CIFAR100DataModule(root=tmp_path).setup("fit")


def test_a_wrong_checksum_is_named_and_can_be_switched_off_loudly(tmp_path):
    write_cifar10(tmp_path)
    with pytest.raises(DataError, match=r"data_batch_1 has the MD5 sum \w{32} where c99cafc.*verify=false"):
        CIFAR10DataModule(root=tmp_path).prepare_data()
    with pytest.warns(UserWarning, match=r"verify=False.*data_batch_1.*test_batch"):
        CIFAR10DataModule(root=tmp_path, verify=False).prepare_data()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"sampling": "half"}, "sampling='half'"),
        ({"val_fraction": 1.0}, "val_fraction=1.0"),
        ({"mean": [0.5]}, "3 channel"),
        ({"std": [1, 1, 0]}, "positive"),
        ({"num_classes": 100}, r"num_classes=100\): these data have 10 classes"),
        ({"image_shape": [3, 32, 32]}, r"image_shape=\[3, 32, 32\]\): the batches have images of shape \[3, 28, 28\]"),
        ({"train_transform": CenterCrop(40)}, "cannot crop"),
        ({"eval_transform": CenterCrop(33)}, "cannot crop"),
        ({"train_transform": PadCropFlip(50)}, "cannot crop"),
        ({"eval_transform": CenterCrop(32)}, "give both the same size"),
    ],
)
def test_bad_arguments_are_refused_before_any_file_is_read(arguments, says):
    with pytest.raises(ValueError, match=rf"CIFAR10DataModule\(.*{says}"):
        CIFAR10DataModule(**arguments)
