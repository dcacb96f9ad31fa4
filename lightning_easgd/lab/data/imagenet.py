"""ImageNet (ILSVRC2012) from its folders of JPEG files.

O. Russakovsky et al., *ImageNet large scale visual recognition challenge*, 2015. It cannot be downloaded without an
account at https://www.image-net.org.
"""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, final, get_args

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset
from typing_extensions import override

from lightning_easgd.lab.data.errors import DataError
from lightning_easgd.lab.data.expected import check_expected
from lightning_easgd.lab.data.image_folders import ImageFiles, OnCorrupt, class_folders, image_files, list_images
from lightning_easgd.lab.data.imagenet_labels import flat_labels
from lightning_easgd.lab.data.images import ImageDataModule, ImageFacts
from lightning_easgd.lab.data.jpeg_crops import ImageCrop, ShortSideCenterCrop, ShortSideRandomCropFlip
from lightning_easgd.lab.data.sampling import worker_stream

Split: TypeAlias = Literal["train", "val"]
Listing: TypeAlias = tuple[list[str], NDArray[np.int64]]


@final
class ImageNetDataModule(ImageDataModule):
    """ImageNet, or any set in its layout: `train/<class>/*.JPEG`, `val/<class>/*.JPEG`.

    Validation images may also lie directly in `val`, as they are unpacked, if `root` has their labels (the development
    kit's or `LOC_val_solution.csv`). Classes are numbered in the order of their names. The official test set has no
    public labels: the test set here is `val`. Images are decoded in the loader processes; batches are float32,
    normalised by the mean and standard deviation that torchvision's models are trained with.

    Args:
        root: Folder that holds `train` and `val`.
        batch_size: Images in a batch of one worker.
        sampling: "full": every worker draws its own shuffle of the whole training set, as in the paper; "sharded":
            each worker has its own part of it; "dynamic": workers draw from a common pool (:class:`DynamicShare`).
        num_workers: Processes that decode images in each worker.
        seed: Seed of the order and the augmentation of training images.
        val_fraction: Share of the training images that is held out for validation; with 0, as usual, the validation
            set is the test set.
        train_transform: Crops of training images; None: the EASGD paper's, 221x221 from a short side of 256, flipped.
        eval_transform: Crops of validation images; None: the center that matches.
        mean: Subtracted from each channel of images in [0, 1]; None: see above.
        std: Divides each channel; None: see above.
        on_corrupt: For an image that cannot be decoded: "raise" an error that names it, or "skip" it with a warning.
        num_classes: How many classes `train` must have.
        image_shape: What a model is built for; None, or the shape (3, H, W) of what the transforms return.

    Raises:
        ModuleNotFoundError: If Pillow is missing.
        ValueError: If an argument is unknown or does not fit the others.
        DataError: In `setup`, if folders, classes or labels are missing or not as many as they should be.
    """

    # Usual since torchvision's first models; from a sample of the training set.
    facts = ImageFacts("ImageNet", 3, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))

    def __init__(
        self,
        root: str | Path = "data/imagenet",
        batch_size: int = 128,
        sampling: str = "full",
        num_workers: int = 4,
        seed: int = 0,
        val_fraction: float = 0.0,
        train_transform: ImageCrop | None = None,
        eval_transform: ImageCrop | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        on_corrupt: OnCorrupt = "raise",
        num_classes: int = 1000,
        image_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            sampling=sampling,
            num_workers=num_workers,
            seed=seed,
            val_fraction=val_fraction,
            mean=mean,
            std=std,
        )
        if importlib.util.find_spec("PIL") is None:  # here, where no process has started yet
            raise ModuleNotFoundError(
                "ImageNetDataModule(): Pillow, which decodes the images, is not installed; run pip install "
                "'lightning_easgd[images]'."
            )
        if on_corrupt not in get_args(OnCorrupt):
            raise ValueError(f"ImageNetDataModule(on_corrupt={on_corrupt!r}): choose 'raise' or 'skip'.")
        self.train_transform = train_transform or ShortSideRandomCropFlip(221)
        self.eval_transform = eval_transform or ShortSideCenterCrop(self.train_transform.size)
        if self.train_transform.size != self.eval_transform.size:
            raise ValueError(
                f"ImageNetDataModule(eval_transform={self.eval_transform}): train_transform makes images of "
                f"{self.train_transform.size} pixels; give both the same size."
            )
        self.root = Path(root)
        self.on_corrupt = on_corrupt
        self.num_classes = num_classes
        self.image_shape = (3, self.train_transform.size, self.train_transform.size)
        check_expected(self, None, image_shape)
        self._classes: list[str] = []
        self._listings: dict[Split, Listing] = {}

    @override
    def setup(self, stage: str) -> None:
        """Lists the files that a stage needs."""
        if stage in ("fit", "validate"):
            self._listing("train")
        if stage == "test" or self.val_fraction == 0:
            self._listing("val")

    @override
    def training_set(self) -> tuple[Dataset[Any], Callable[[Any], Any]]:
        rows = self.parts(self._listing("train")[1])["train"]
        return self._files("train", rows, self.train_transform, worker_stream(self.rank, self.seed))

    @override
    def evaluation_set(self, split: str) -> tuple[Dataset[Any], Callable[[Any], Any]]:
        if split == "train" or (split == "val" and self.val_fraction > 0):
            return self._files("train", self.parts(self._listing("train")[1])[split], self.eval_transform)
        return self._files("val", np.arange(len(self._listing("val")[0])), self.eval_transform)

    def _files(
        self, split: Split, rows: NDArray[np.int64], crop: ImageCrop, stream: int = 0
    ) -> tuple[Dataset[Any], Callable[[Any], Any]]:
        names, labels = self._listing(split)
        chosen = [names[row] for row in rows]
        files = ImageFiles(self.root / split, chosen, labels[rows], crop, stream, self.on_corrupt)
        return files, files.collate(self.normalise)

    def _listing(self, split: Split) -> Listing:
        if not self._classes:
            self._classes = self._find_classes()
        if split not in self._listings:
            self._listings[split] = self._list(split)
        return self._listings[split]

    def _find_classes(self) -> list[str]:
        classes = class_folders(self.root / "train")
        if len(classes) != self.num_classes:
            raise DataError(
                f"{self.root / 'train'}: it has {len(classes)} class folders where num_classes={self.num_classes}; "
                f"set data.num_classes={len(classes)} if they are all there"
            )
        return classes

    def _list(self, split: Split) -> Listing:
        folder = self.root / split
        present = class_folders(folder)
        if split == "train" or present:
            different = sorted(set(present) ^ set(self._classes))
            if different:
                raise DataError(
                    f"{folder}: its class folders are not those of train ({len(different)} differ, {different[0]} for "
                    "one); unpack it again"
                )
            return list_images(folder, self._classes)
        names = image_files(folder)
        if not names:
            raise DataError(f"{folder}: there are neither class folders nor JPEG files; unpack it again")
        return names, flat_labels(self.root, names, self._classes)
