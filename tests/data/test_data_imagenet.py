"""ImageNet's folders are listed and labelled right; images are cropped as defined; damaged files are named."""

import random
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from official_data import WNIDS, write_imagenet, write_jpeg

from lightning_easgd.lab.data import (
    DataError,
    ImageNetDataModule,
    RandomResizedCropFlip,
    ShortSideCenterCrop,
    ShortSideRandomCropFlip,
)
from lightning_easgd.lab.data.jpeg_crops import _maybe_mirrored

Image = pytest.importorskip("PIL.Image")
pytestmark = pytest.mark.timeout(60)
SMALL = {"train_transform": ShortSideRandomCropFlip(16, 20), "eval_transform": ShortSideCenterCrop(16, 20)}


def imagenet(root, **arguments) -> ImageNetDataModule:
    defaults = {"num_classes": 3, "num_workers": 0, "batch_size": 5, "mean": [0] * 3, "std": [1] * 3} | SMALL
    module = ImageNetDataModule(root=root, **(defaults | arguments))
    module.setup("fit")
    module.setup("test")
    return module


def labels_match_colours(loader) -> int:
    """The number of images, of which each has the colour that tells its class."""
    count = 0
    for images, labels in loader:
        assert images.shape[1:] == (3, 16, 16)
        assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
        means = images.mean((2, 3))
        assert means.argmax(1).tolist() == labels.tolist()
        assert torch.allclose(means.max(1).values, torch.tensor(200 / 255), atol=0.02)
        count += len(labels)
    return count


def test_class_folders(tmp_path):
    write_imagenet(tmp_path)
    module = imagenet(tmp_path)
    assert labels_match_colours(module.train_dataloader()) == 12
    assert labels_match_colours(module.val_dataloader()) == 6
    assert labels_match_colours(module.test_dataloader()) == 6


def test_held_out_training_images(tmp_path):
    write_imagenet(tmp_path)
    module = imagenet(tmp_path, val_fraction=0.25)
    assert labels_match_colours(module.train_dataloader()) == 9
    assert labels_match_colours(module.val_dataloader()) == 3


def flatten(root) -> list[str]:
    """Moves the validation images out of their folders under official names; returns the class of each."""
    paths = sorted((root / "val").glob("*/*.JPEG"), key=lambda path: path.name[::-1])  # classes in mixed order
    order = []
    for number, path in enumerate(paths, start=1):
        order.append(path.parent.name)
        path.rename(root / "val" / f"ILSVRC2012_val_{number:08d}.JPEG")
    for wnid in WNIDS:
        (root / "val" / wnid).rmdir()
    return order


def write_solution(root, order):
    lines = [f"ILSVRC2012_val_{number:08d},{wnid} 1 2 3 4 " for number, wnid in enumerate(order, start=1)]
    (root / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *reversed(lines)]) + "\n")


def write_devkit(root, order):
    savemat = pytest.importorskip("scipy.io").savemat
    folder = root / "ILSVRC2012_devkit_t12" / "data"
    folder.mkdir(parents=True)
    numbers = {wnid: number for number, wnid in enumerate([WNIDS[1], WNIDS[2], WNIDS[0]], start=1)}
    table = np.zeros((4, 1), dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")])
    for row, (wnid, number) in enumerate([*numbers.items(), ("n00001740", 1001)]):
        table[row, 0] = (float(number), wnid, "a word, another", 0.0)
    savemat(folder / "meta.mat", {"synsets": table})
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{numbers[wnid]}\n" for wnid in order))
    return folder


@pytest.mark.parametrize("write", [write_solution, write_devkit])
def test_flat_validation_images(tmp_path, write):
    write_imagenet(tmp_path)
    write(tmp_path, flatten(tmp_path))
    assert labels_match_colours(imagenet(tmp_path).val_dataloader()) == 6
    # Labels belong to the images' numbers: a subset keeps them.
    (tmp_path / "val" / "ILSVRC2012_val_00000002.JPEG").unlink()
    assert labels_match_colours(imagenet(tmp_path).val_dataloader()) == 5


def failure(root, **arguments) -> str:
    with pytest.raises(DataError) as caught:
        imagenet(root, **arguments)
    return str(caught.value)


def test_flat_validation_images_need_labels(tmp_path):
    write_imagenet(tmp_path)
    order = flatten(tmp_path)
    assert "put LOC_val_solution.csv or ILSVRC2012_devkit_t12/data into" in failure(tmp_path)
    write_solution(tmp_path, order[:-1])
    assert "there is no label for ILSVRC2012_val_00000006.JPEG" in failure(tmp_path)
    write_solution(tmp_path, ["n99999999", *order[1:]])
    assert "class n99999999, which has no folder in train" in failure(tmp_path)
    for content in (b"", b"a,b\n1,2\n", b"ImageId,PredictionString\nx,\n", b"ImageId,PredictionString\n\xff\xfe,n\n"):
        (tmp_path / "LOC_val_solution.csv").write_bytes(content)
        assert "LOC_val_solution.csv: " in failure(tmp_path)


def test_a_damaged_development_kit_is_named(tmp_path):
    write_imagenet(tmp_path)
    folder = write_devkit(tmp_path, flatten(tmp_path))
    truth, meta = folder / "ILSVRC2012_validation_ground_truth.txt", folder / "meta.mat"
    lines = truth.read_text()
    truth.write_text(lines[:4])
    assert "its 2 lines have no label for ILSVRC2012_val_00000003.JPEG" in failure(tmp_path)
    truth.write_text(lines.replace("1", "77"))
    assert "there is no class 77 in meta.mat" in failure(tmp_path)
    truth.write_text("one\ntwo\n")
    assert "no list of class numbers" in failure(tmp_path)
    truth.write_text(lines)
    meta.write_bytes(meta.read_bytes()[:200])
    assert "meta.mat: this file cannot be read" in failure(tmp_path)
    meta.unlink()
    assert "meta.mat: this file cannot be read" in failure(tmp_path)


def test_missing_and_mismatched_folders_are_named(tmp_path):
    assert "train: No such file or directory; root (data.root) is the folder that holds train" in failure(tmp_path)
    write_imagenet(tmp_path)
    assert "3 class folders where num_classes=1000; set data.num_classes=3" in failure(tmp_path, num_classes=1000)
    shutil.rmtree(tmp_path / "val" / WNIDS[1])
    assert f"not those of train (1 differ, {WNIDS[1]}" in failure(tmp_path)
    shutil.rmtree(tmp_path / "val")
    assert "val: No such file" in failure(tmp_path)
    (tmp_path / "val").mkdir()
    assert "neither class folders nor JPEG files" in failure(tmp_path)
    shutil.rmtree(tmp_path / "train" / WNIDS[0])
    (tmp_path / "train" / WNIDS[0]).mkdir()
    assert f"{WNIDS[0]}: there is no JPEG file" in failure(tmp_path)


def damage(path, kind):
    content = path.read_bytes()
    path.write_bytes({"truncated": content[:-60], "empty": b"", "text": b"<html></html>", "head": content[:25]}[kind])


@pytest.mark.parametrize("kind", ["truncated", "empty", "text", "head"])
@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.processes)])
def test_a_corrupt_image_is_named(tmp_path, kind, num_workers):
    write_imagenet(tmp_path, size=(200, 150))
    path = tmp_path / "train" / WNIDS[1] / f"{WNIDS[1]}_2.JPEG"
    damage(path, kind)
    with pytest.raises(DataError, match=rf"{path}: this image cannot be decoded .* on_corrupt=skip"):
        list(imagenet(tmp_path, num_workers=num_workers).train_dataloader())


@pytest.mark.parametrize("kind", ["truncated", "empty", "text", "head"])
def test_a_corrupt_image_can_be_skipped_with_a_warning(tmp_path, kind):
    write_imagenet(tmp_path, size=(200, 150))
    path = tmp_path / "train" / WNIDS[1] / f"{WNIDS[1]}_2.JPEG"
    damage(path, kind)
    with pytest.warns(UserWarning, match=rf"{path}: this image cannot be decoded .* is skipped"):
        assert labels_match_colours(imagenet(tmp_path, on_corrupt="skip").train_dataloader()) == 11


@pytest.mark.filterwarnings("ignore:.* is skipped:UserWarning")
def test_a_batch_without_any_image_is_an_error(tmp_path):
    write_imagenet(tmp_path)
    for path in tmp_path.glob("train/*/*"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="none of the 5 images of a batch can be decoded"):
        list(imagenet(tmp_path, on_corrupt="skip").train_dataloader())


def test_grey_images_become_rgb(tmp_path):
    write_imagenet(tmp_path)
    for number, mode in enumerate(("L", "CMYK")):
        Image.new(mode, (30, 40)).save(tmp_path / "train" / WNIDS[0] / f"{WNIDS[0]}_{number}.JPEG", "JPEG")
    for images, _ in imagenet(tmp_path).train_dataloader():
        assert images.shape[1:] == (3, 16, 16)


@pytest.mark.processes
def test_augmentation_follows_seed_rank_and_epoch_and_not_the_processes(tmp_path):
    write_imagenet(tmp_path)
    generator = np.random.default_rng(0)
    for path in tmp_path.glob("train/*/*"):
        Image.fromarray(generator.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path, "JPEG")

    def drawn(rank=0, epoch=0, **arguments):
        module = imagenet(tmp_path, sampling="sharded", **arguments)
        module.trainer = SimpleNamespace(
            global_rank=rank, world_size=1, strategy=None, distributed_sampler_kwargs={"num_replicas": 1, "rank": 0}
        )
        loader = module.train_dataloader()
        loader.sampler.set_epoch(epoch)
        return torch.cat([images.sum((1, 2, 3)) for images, _ in loader]).double().sum()

    assert drawn() == drawn() == drawn(num_workers=2)
    assert len({drawn().item(), drawn(epoch=1).item(), drawn(seed=1).item()}) == 3


# Crops, against the straightforward way of making them.

PICTURE = Image.effect_mandelbrot((90, 60), (-2, -1.5, 1, 1.5), 60).convert("RGB")


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))


def triangle_weights(pixels: int, scaled: int, offset: int, size: int) -> np.ndarray:
    """Bilinear scaling of a row of pixels, only `size` of them from `offset` on, as a matrix in float64."""
    scale = pixels / scaled
    centers = (np.arange(offset, offset + size) + 0.5) * scale
    weights = np.maximum(0, 1 - abs(np.arange(pixels) + 0.5 - centers[:, None]) / max(scale, 1))
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("picture", [PICTURE, NOISE], ids=["smooth", "noise"])
@pytest.mark.parametrize("size", [(90, 60), (60, 90), (77, 53), (64, 64), (20, 300)])
def test_center_crop_of_a_scaled_image(picture, size):
    image = picture.resize(size)
    crop = np.asarray(ShortSideCenterCrop(40, 48)(image, random.Random(0)), float)
    width, height = (48, int(48 * size[1] / size[0])) if size[0] <= size[1] else (int(48 * size[0] / size[1]), 48)
    down = triangle_weights(size[1], height, (height - 40) // 2, 40)
    across = triangle_weights(size[0], width, (width - 40) // 2, 40)
    exact = np.einsum("ab,bcd,ec->aed", down, np.asarray(image, float), across)
    assert crop.shape == (40, 40, 3)
    # Pillow rounds to whole grey levels twice, after each direction; its weights are fixed-point numbers.
    assert abs(crop - exact).max() <= 1.02


def test_random_crops_reach_all_of_a_scaled_image():
    image = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8)[None, :, None], (64, 1, 3)))
    lefts, mirrored = set(), set()
    for seed in range(300):
        row = np.asarray(ShortSideRandomCropFlip(60, 64)(image, random.Random(seed)))[0, :, 0].astype(int)
        lefts.add(row.min())
        mirrored.add(row[0] > row[-1])
        assert sorted(row) == list(range(row.min(), row.min() + 60))
    assert lefts == set(range(5))
    assert mirrored == {True, False}


def test_parts_of_random_area_and_ratio_stay_within_their_bounds():
    crop = RandomResizedCropFlip(32)
    areas, ratios = [], []
    for seed in range(2000):
        left, top, right, bottom = crop._part(PICTURE, random.Random(seed))
        assert 0 <= left < right <= 90
        assert 0 <= top < bottom <= 60
        areas.append((right - left) * (bottom - top) / (90 * 60))
        ratios.append((right - left) / (bottom - top))
    assert 0.07 < min(areas) < 0.1
    assert max(areas) > 0.85
    assert 0.70 < min(ratios) < 0.8
    assert 1.28 < max(ratios) < 1.40


def test_an_image_of_extreme_shape_gives_its_largest_central_part():
    assert RandomResizedCropFlip(32, min_area=0.9)._part(Image.new("RGB", (1000, 10)), random.Random(0)) == (
        493, 0, 506, 10,
    )  # fmt: skip


def test_a_resized_part_is_scaled_from_its_pixels():
    class Fixed(random.Random):
        def random(self):
            return 0.9  # not mirrored

        def uniform(self, a, b):
            return 0.25 if a == 0.08 else 0.0

        def randint(self, a, b):
            return 7

    image = PICTURE.resize((60, 60))
    part = np.asarray(RandomResizedCropFlip(30)(image, Fixed()))
    assert (part == np.asarray(image.crop((7, 7, 37, 37)))).all()


def test_mirroring():
    image = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(2, 2, 3))
    seen = {np.asarray(_maybe_mirrored(image, random.Random(seed))).tobytes() for seed in range(20)}
    assert seen == {np.asarray(image).tobytes(), np.asarray(image)[:, ::-1].tobytes()}


def test_paper_crops_are_the_default():
    module = ImageNetDataModule()
    assert (module.train_transform, module.eval_transform) == (ShortSideRandomCropFlip(221), ShortSideCenterCrop(221))
    assert module.image_shape == (3, 221, 221)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"on_corrupt": "ignore"}, "on_corrupt='ignore'"),
        ({"eval_transform": ShortSideCenterCrop(224)}, "give both the same size"),
        ({"image_shape": [3, 224, 224]}, r"the batches have images of shape \[3, 221, 221\]"),
        ({"sampling": "half"}, "sampling='half'"),
    ],
)
def test_bad_arguments_are_refused(arguments, says):
    with pytest.raises(ValueError, match=rf"ImageNetDataModule\(.*{says}"):
        ImageNetDataModule(**arguments)


@pytest.mark.parametrize("crop", [ShortSideCenterCrop, ShortSideRandomCropFlip])
def test_a_crop_larger_than_the_scaled_image_is_refused(crop):
    with pytest.raises(ValueError, match=rf"{crop.__name__}\(size=300, short_side=256\)"):
        crop(300)


def test_missing_pillow_is_one_clear_sentence(monkeypatch):
    import importlib.util

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "PIL" else find_spec(name, *rest)
    )
    with pytest.raises(ModuleNotFoundError, match=r"Pillow.*pip install 'lightning_easgd\[images\]'"):
        ImageNetDataModule()


def test_jpegs_of_other_spelling_are_found(tmp_path):
    write_imagenet(tmp_path, train=1)
    write_jpeg(tmp_path / "train" / WNIDS[0] / "a.jpg", 0)
    write_jpeg(tmp_path / "train" / WNIDS[2] / "b.jpeg", 2)
    (tmp_path / "train" / WNIDS[2] / "notes.txt").write_text("no image")
    assert labels_match_colours(imagenet(tmp_path).train_dataloader()) == 5
