"""Batched crops are those of a loop over the images."""

import numpy as np
import pytest
import torch

from lightning_easgd.lab.data import CenterCrop, PadCropFlip, RandomCropFlip
from lightning_easgd.lab.data.crops import WORDS
from lightning_easgd.lab.data.images import Normalise
from lightning_easgd.lab.data.in_memory import ImageBatches
from lightning_easgd.lab.data.randomness import below, random_words

pytestmark = pytest.mark.timeout(60)
IMAGES = np.random.default_rng(0).integers(0, 256, (30, 3, 12, 10), dtype=np.uint8)
ROWS = np.array([4, 4, 29, 0, 7, 13, 22])


def words(seed: int = 0) -> np.ndarray:
    return random_words(seed, np.arange(len(ROWS)), WORDS)


def one_by_one(images: np.ndarray, size: int, word: np.ndarray) -> np.ndarray:
    tops, lefts = below(word[0], images.shape[2] - size + 1), below(word[1], images.shape[3] - size + 1)
    crops = []
    for image, top, left, flip in zip(images, tops, lefts, below(word[2], 2), strict=True):
        crop = image[:, top : top + size, left : left + size]
        crops.append(crop[:, :, ::-1] if flip else crop)
    return np.stack(crops)


def test_random_crops_and_flips():
    word = words()
    crops = RandomCropFlip(7)(IMAGES, ROWS, word)
    assert crops.dtype == np.uint8
    assert (crops == one_by_one(IMAGES[ROWS], 7, word)).all()
    assert 0 < below(word[2], 2).sum() < len(ROWS)  # both cases are among them


def test_padded_crops_and_flips():
    word = words(1)
    framed = np.pad(IMAGES[ROWS], ((0, 0), (0, 0), (4, 4), (4, 4)))
    assert (PadCropFlip(10, padding=4)(IMAGES, ROWS, word) == one_by_one(framed, 10, word)).all()


def test_center_crop():
    crops = CenterCrop(6)(IMAGES, ROWS, words())
    assert (crops == IMAGES[ROWS][:, :, 3:9, 2:8]).all()
    square = IMAGES[:, :, :10]
    assert (CenterCrop(10)(square, ROWS, words()) == square[ROWS]).all()


@pytest.mark.parametrize("crop", [RandomCropFlip(12), PadCropFlip(12, 2), CenterCrop(12)])
def test_crops_leave_the_data_set_as_it_is(crop):
    images = np.random.default_rng(1).integers(0, 256, (5, 1, 12, 12), dtype=np.uint8)
    before = images.copy()
    crop(images, np.arange(5), random_words(0, np.arange(5), WORDS))[:] = 0
    assert (images == before).all()


def test_every_position_and_both_directions_are_drawn():
    images = np.arange(9, dtype=np.uint8).reshape(1, 1, 3, 3)
    keys = np.arange(400)
    crops = RandomCropFlip(2)(images, np.zeros(400, np.int64), random_words(0, keys, WORDS))
    assert len({crop.tobytes() for crop in crops}) == 8


def test_normalised_values():
    images = np.array([[[[0, 255]], [[51, 102]]]], dtype=np.uint8)
    result = Normalise(mean=(0.5, 0.2), std=(0.25, 0.1))(images)
    assert result.dtype == torch.float32
    assert torch.allclose(result, torch.tensor([[[[-2.0, 2.0]], [[0.0, 2.0]]]]), atol=1e-6)


def test_a_sample_alone_is_that_of_its_batch():
    data = ImageBatches(
        IMAGES, np.arange(30), np.arange(5, 30), RandomCropFlip(8), Normalise([0] * 3, [1] * 3), stream=3
    )
    keys = [0, 24, 25 * 7 + 24]
    images, labels = data.__getitems__(keys)
    assert labels.tolist() == [5, 29, 29]
    assert labels.dtype == torch.int64
    assert not torch.equal(images[1], images[2])  # another epoch
    for key, image, label in zip(keys, images, labels, strict=True):
        alone = data[key]
        assert torch.equal(alone[0], image)
        assert alone[1] == label
