"""ImageNet (ILSVRC2012) from its folders of JPEG files.

O. Russakovsky et al., *ImageNet large scale visual recognition challenge*, 2015. It cannot be downloaded without an
account at https://www.image-net.org.
"""

import importlib.util
from pathlib import Path
from typing import Unpack, final, get_args

from typing_extensions import override

from lightning_easgd.lab.data.errors import DataError
from lightning_easgd.lab.data.image_folders import ImageFiles, OnCorrupt, class_folders, image_files, list_images
from lightning_easgd.lab.data.imagenet_labels import flat_labels
from lightning_easgd.lab.data.images import Batches, ImageArguments, ImageDataModule, ImageFacts, Rows, Split
from lightning_easgd.lab.data.jpeg_crops import ImageCrop, ShortSideCenterCrop, ShortSideRandomCropFlip


@final
class ImageNetDataModule(ImageDataModule):
    """ImageNet, or any set in its layout: `train/<class>/*.JPEG`, `val/<class>/*.JPEG`.

    Validation images may also lie directly in `val`, as they are unpacked, if `root` has their labels (the development
    kit's or `LOC_val_solution.csv`). Classes are numbered in the order of their names. The official test set has no
    public labels: the test set here is `val`. Images are decoded in the loader processes; batches are float32,
    normalised by the mean and standard deviation that torchvision's models are trained with.

    Args:
        root: Folder that holds `train` and `val`.
        on_corrupt: For an image that cannot be decoded: "raise" an error that names it, or "skip" it with a warning.
        **images: See :class:`ImageDataModule`. Here `num_workers`, which decode the images, is 4, `val_fraction` 0, and
            `num_classes`, which `train` must have, 1000; transforms make 221x221 from a short side of 256, as in the
            EASGD paper.

    Raises:
        ModuleNotFoundError: If Pillow is missing.
        ValueError: If an argument is unknown or does not fit the others.
        DataError: In `setup`, if folders, classes or labels are missing or not as many as they should be.
    """

    # Usual since torchvision's first models; from a sample of the training set.
    facts = ImageFacts("ImageNet", 3, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))

    default_transform = ShortSideRandomCropFlip(221)
    center_crop = ShortSideCenterCrop

    def __init__(
        self, root: str | Path = "data/imagenet", *, on_corrupt: OnCorrupt = "raise", **images: Unpack[ImageArguments]
    ) -> None:
        settings: ImageArguments = {"num_workers": 4, "val_fraction": 0.0}
        settings.update(images)
        self.num_classes = images.get("num_classes") or 1000
        super().__init__(**settings)
        if importlib.util.find_spec("PIL") is None:  # here, where no process has started yet
            raise ModuleNotFoundError(
                "ImageNetDataModule(): Pillow, which decodes the images, is not installed; run pip install "
                "'lightning_easgd[images]'."
            )
        if on_corrupt not in get_args(OnCorrupt):
            raise ValueError(f"ImageNetDataModule(on_corrupt={on_corrupt!r}): choose 'raise' or 'skip'.")
        self.root = Path(root)
        self.on_corrupt = on_corrupt
        self._classes: list[str] = []
        self._listings: dict[Split, tuple[list[str], Rows]] = {}

    @override
    def check_files(self) -> None:
        self._classes = self._find_classes()

    @override
    def cropped_shape(self, name: str) -> tuple[int, int, int]:
        size = getattr(self, name).size
        return 3, size, size

    @override
    def labels(self, split: Split) -> Rows:
        if not self._classes:
            self._classes = self._find_classes()
        if split not in self._listings:
            self._listings[split] = self._list("train" if split == "train" else "val")
        return self._listings[split][1]

    @override
    def batches(self, split: Split, rows: Rows, crop: ImageCrop, stream: int) -> Batches:
        names, labels = self._listings[split]
        folder = self.root / ("train" if split == "train" else "val")
        files = ImageFiles(folder, [names[row] for row in rows], labels[rows], crop, stream, self.on_corrupt)
        return files, files.collate(self.normalise)

    def _find_classes(self) -> list[str]:
        classes = class_folders(self.root / "train")
        if len(classes) != self.num_classes:
            raise DataError(
                f"{self.root / 'train'}: it has {len(classes)} class folders where num_classes={self.num_classes}; "
                f"set data.num_classes={len(classes)} if they are all there"
            )
        return classes

    def _list(self, name: str) -> tuple[list[str], Rows]:
        folder = self.root / name
        present = class_folders(folder)
        if name == "train" or present:
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
