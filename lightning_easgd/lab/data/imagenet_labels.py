"""Labels of ILSVRC2012's validation images where they lie in one folder, as they are unpacked."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_easgd.lab.data.errors import DataError

SOLUTION = "LOC_val_solution.csv"
DEVKIT = "ILSVRC2012_devkit_t12/data"
_GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"


def flat_labels(root: Path, names: Sequence[str], classes: Sequence[str]) -> NDArray[np.int64]:
    """Return the labels of validation images, from whichever of two files lies in `root`.

    `LOC_val_solution.csv` (of the Kaggle release) has a line for each image: its name, then the class and boxes. The
    development kit's `ILSVRC2012_validation_ground_truth.txt` has on line n the number of the class of image n, and its
    `meta.mat` the class of each number.

    Args:
        root: Folder that holds one of the two.
        names: File names as `ILSVRC2012_val_00000001.JPEG`.
        classes: The WordNet ids; the position in this list is the label.

    Raises:
        DataError: If both are missing or torn, or an image has no label or one of an unknown class.
    """
    if (root / SOLUTION).is_file():
        source = root / SOLUTION
        found = _from_solution(source, names)
    elif (root / DEVKIT / _GROUND_TRUTH).is_file():
        source = root / DEVKIT / _GROUND_TRUTH
        found = _from_devkit(root / DEVKIT, names)
    else:
        raise DataError(
            f"{root / 'val'}: images without class folders need their labels: put {SOLUTION} or {DEVKIT} into {root}, "
            "or the images into val/<class>"
        )
    numbers = {name: label for label, name in enumerate(classes)}
    unknown = sorted(set(found) - set(numbers))
    if unknown:
        raise DataError(f"{source}: validation images are of the class {unknown[0]}, which has no folder in train")
    return np.asarray([numbers[name] for name in found], np.int64)


def _from_solution(path: Path, names: Sequence[str]) -> list[str]:
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            classes = {row["ImageId"]: row["PredictionString"].split()[0] for row in csv.DictReader(stream)}
    except (KeyError, IndexError, AttributeError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: this is no table of ImageId and PredictionString ({error!r}); get it again"
        ) from error
    missing = [name for name in names if Path(name).stem not in classes]
    if missing:
        raise DataError(f"{path}: there is no label for {missing[0]}; get the file again")
    return [classes[Path(name).stem] for name in names]


def _from_devkit(folder: Path, names: Sequence[str]) -> list[str]:
    truth = folder / _GROUND_TRUTH
    try:
        numbers = [int(line) for line in truth.read_text(encoding="ascii").split()]
    except ValueError as error:
        raise DataError(f"{truth}: this is no list of class numbers ({error}); get it again") from error
    classes = _synsets(folder / "meta.mat")
    found = []
    for name in names:
        digits = Path(name).stem.rpartition("_")[2]
        if not digits.isdecimal() or not 1 <= int(digits) <= len(numbers):
            raise DataError(f"{truth}: its {len(numbers)} lines have no label for {name}")
        number = numbers[int(digits) - 1]
        if number not in classes:
            raise DataError(f"{truth}: there is no class {number} in meta.mat")
        found.append(classes[number])
    return found


def _synsets(path: Path) -> dict[int, str]:
    try:
        from scipy.io import loadmat  # noqa: PLC0415  # an extra, needed only here
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{path}: reading it needs SciPy; run pip install 'lightning_easgd[images]', or use {SOLUTION}"
        ) from error
    try:
        synsets: Any = loadmat(str(path), squeeze_me=True)["synsets"]
        numbers, names = np.atleast_1d(synsets["ILSVRC2012_ID"]), np.atleast_1d(synsets["WNID"])
        return {int(number): str(name) for number, name in zip(numbers, names, strict=True)}
    except Exception as error:  # a torn file can raise anything
        raise DataError(f"{path}: this file cannot be read ({error}); unpack the development kit again") from error
