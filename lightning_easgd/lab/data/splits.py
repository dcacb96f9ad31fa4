"""Parts of a data set that are the same in every process and for every seed."""

import numpy as np
from numpy.typing import NDArray

_SPLIT_SEED = 2015


def stratified_split(labels: NDArray[np.int64], fractions: dict[str, float], rest: str) -> dict[str, NDArray[np.int64]]:
    """Split the row numbers of `labels` so that each part has the same share of every class.

    Args:
        labels: The class of each row.
        fractions: Name and share of each part but one.
        rest: Name of the part that takes what remains.

    Returns:
        The sorted row numbers of each part.
    """
    generator = np.random.default_rng(_SPLIT_SEED)
    parts: dict[str, list[NDArray[np.int64]]] = {name: [] for name in (*fractions, rest)}
    for label in np.unique(labels):
        rows = generator.permutation(np.flatnonzero(labels == label))
        start = 0
        for name, fraction in fractions.items():
            stop = start + round(fraction * len(rows))
            parts[name].append(rows[start:stop])
            start = stop
        parts[rest].append(rows[start:])
    return {name: np.sort(np.concatenate(chunks)) for name, chunks in parts.items()}
