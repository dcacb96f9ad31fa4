"""How the flat vector is cut into chunks, and which node keeps which chunk."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import final

__all__ = ["CHUNK_ELEMENTS", "Layout", "place_chunks"]

CHUNK_ELEMENTS = 256 * 1024
"""Elements of one chunk: 1 MiB of float32 fits a core's cache, and hides the cost of a lock or a message."""


@final
@dataclass(frozen=True)
class Layout:
    """The chunks of a flat vector. An exchange is atomic within a chunk.

    Attributes:
        chunks: The part of the flat vector that each chunk is; no chunk crosses a segment's boundary.
        segments: For each chunk the number of the segment that it lies in; one segment has one rate.
    """

    chunks: tuple[slice, ...]
    segments: tuple[int, ...]

    @classmethod
    def cut(cls, segments: Sequence[tuple[int, int]], chunk_elements: int = CHUNK_ELEMENTS) -> "Layout":
        """Cut segments into chunks of nearly equal size.

        Args:
            segments: (start, stop) of each segment of the flat vector; empty ones are allowed.
            chunk_elements: The most elements that a chunk may have.
        """
        chunks: list[slice] = []
        numbers: list[int] = []
        for number, (start, stop) in enumerate(segments):
            pieces = -(-(stop - start) // chunk_elements)
            edges = [start + (stop - start) * piece // pieces for piece in range(pieces)] + [stop]
            chunks += [slice(a, b) for a, b in pairwise(edges)]
            numbers += [number] * pieces
        return cls(tuple(chunks), tuple(numbers))

    def size(self, chunk: int) -> int:
        """Elements of a chunk."""
        part = self.chunks[chunk]
        return int(part.stop) - int(part.start)


def place_chunks(layout: Layout, nodes: int) -> list[int]:
    """The node that keeps each chunk: contiguous shards with nearly equal numbers of elements."""
    sizes = [layout.size(chunk) for chunk in range(len(layout.chunks))]
    total = sum(sizes)
    placed, before = [], 0
    for size in sizes:
        placed.append(min(nodes - 1, (2 * before + size) * nodes // (2 * total)))
        before += size
    return placed
