# SPDX-License-Identifier: Apache-2.0
"""How large the chunks of a transfer are: as large as makes it end soonest.

A transfer of ``n`` chunks takes what its first one takes alone, and then the pace of its slowest leg for each of the others. Large
chunks pay what a chunk costs less often; small ones are sooner on the second leg and sooner through the last one. Which of
them matters more depends on how much there is to move, and on the legs: they are predicted by the cost model until chunks
have been moved, and measured from then on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from kvxfer.planner.pipeline_depth import Depth

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvxfer.planner.chunks import ChunkPlanner

_BELIEVED: Final = 256
"""Transfers in other sizes, after which what was measured of one is forgotten: it would never be tried again."""


class Legs(NamedTuple):
    """What a transfer takes by the cost model, in seconds.

    Attributes:
        start_s: from asking for the first chunk until it is there, but for the packing itself.
        there_s, here_s: for all bytes, on the source's side and, beside that, on this one.
        chunk_s: for each chunk, on this side.
    """

    start_s: float
    there_s: float
    here_s: float
    chunk_s: float

    def alone_s(self, chunks: float) -> float:
        """The first one of so many chunks."""
        return self.start_s + (self.there_s + self.here_s) / chunks + self.chunk_s

    def pace_s(self, chunks: float) -> float:
        """From the end of one of so many to that of the next."""
        return max(self.there_s / chunks, self.here_s / chunks + self.chunk_s)

    def seconds(self, chunks: float) -> float:
        """All of them."""
        return self.alone_s(chunks) + (chunks - 1) * self.pace_s(chunks)


@dataclass(eq=False)
class Size:
    """One size of chunks, and what is known of it.

    Attributes:
        nbytes: no chunk is larger.
        chunk_planner: the chunks.
        depth: how many of them are under way at a time, and what they were seen to take.
        chosen: when it was last, in transfers.
    """

    nbytes: int
    chunk_planner: ChunkPlanner
    depth: Depth
    chosen: int = 0


class Chunking:
    """The sizes that chunks of one route can have: halves of each other. Data thread only.

    Args:
        chunk_planner: the largest chunks.
        least_nbytes: smaller ones are not thought of, unless the largest are.
        in_flight: most chunks of a transfer at a time.
    """

    def __init__(self, chunk_planner: ChunkPlanner, *, least_nbytes: int, in_flight: int) -> None:
        self._transfers = 0
        self.sizes: list[Size] = [Size(chunk_planner.slot_nbytes, chunk_planner, Depth(in_flight))]
        nbytes = chunk_planner.slot_nbytes // 2
        while nbytes >= max(least_nbytes, chunk_planner.least_nbytes):
            self.sizes.append(Size(nbytes, chunk_planner.resized(nbytes), Depth(in_flight)))
            nbytes //= 2

    def predicted_s(self, nbytes: float, chunks: float, legs: Legs) -> float:
        """Seconds of a transfer by the cost model.

        Args:
            nbytes: of all chunks.
            chunks: of the largest size.
            legs: what the model says.
        """
        return min(legs.seconds(_number(size, nbytes, chunks)) for size in self.sizes)

    def best(self, nbytes: float, chunks: float, legs: Legs) -> Size:
        """The size of chunks with which a transfer ends soonest, as far as is known; see `predicted_s`."""
        self._transfers += 1
        for size in self.sizes:
            if self._transfers - size.chosen > _BELIEVED:
                size.depth.forget()
                size.chosen = self._transfers
        alone = [(size.nbytes, s) for size in self.sizes if (s := size.depth.alone_s) is not None]
        paces = [(size.nbytes, s) for size in self.sizes if (s := size.depth.pace_s) is not None]

        def seconds(size: Size) -> float:
            number = _number(size, nbytes, chunks)
            alone_s = _scaled(alone, size.nbytes, legs.start_s + legs.chunk_s) or legs.alone_s(number)
            pace_s = _scaled(paces, size.nbytes, legs.chunk_s) or legs.pace_s(number)
            # Where no more may be under way, they cannot end faster than that.
            return alone_s + (number - 1) * max(pace_s, alone_s / size.depth.most)

        best = min(self.sizes, key=seconds)
        best.chosen = self._transfers
        return best


def _number(size: Size, nbytes: float, chunks: float) -> float:
    return max(1.0, chunks, nbytes / size.nbytes)


def _scaled(measured: Sequence[tuple[int, float]], nbytes: int, fixed_s: float) -> float | None:
    """What a chunk takes by what the one nearest in size does, of which so much has nothing to do with its size."""
    if not measured:
        return None
    at, seconds = min(measured, key=lambda each: max(each[0] / nbytes, nbytes / each[0]))
    fixed_s = min(fixed_s, seconds / 2)
    return fixed_s + (seconds - fixed_s) * nbytes / at
