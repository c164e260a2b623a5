# SPDX-License-Identifier: Apache-2.0
"""Block tables of requests: what callers and peers give, and the same checked once, on the engine's thread."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property
from operator import index
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from kvxfer.errors import BlockError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvxfer.layout.spec import CacheGroup, CacheSpec

BlockIds = npt.NDArray[np.int64]
"""Block ids of one cache group, in token order."""

Tokens = tuple[int, "int | None"]
"""Tokens ``[start, stop)`` of a request; stop None means to the end."""

MAX_TOKENS = 1 << 40
"""Upper bound of the length of a request."""

_KEEPS_LOCK: Final = 499
"""Elements for which NumPy keeps the interpreter's lock; it releases the lock for more than 500. These functions run on the engine's
thread, which would then wait for another thread's turn, longer than all of this takes."""
_NUMBERS: Final = np.arange(1 << 16, dtype=np.int32)
"""Made once, because making them releases the lock. A request of a million tokens has as many blocks of 16."""
_MOST_PLACES: Final = 1 << 22
"""Most entries of a temporary array with an entry for each block of a cache; a peer's number of blocks is not trusted."""


@dataclass(frozen=True, eq=False)
class BlockTable:
    """Blocks that hold the tokens of one request, in one cache group.

    Attributes:
        ids: block ids in token order; integers in a list or array.
        first_token: first token of the first block, a multiple of the group's ``block_tokens``. It is 0 unless the table lacks its
            beginning (a prefix that is elsewhere, a sliding window). A sliding window may begin inside its first block; what that
            holds before is not to be read. It has no meaning for states, which have no tokens.
        needed_from: of a sliding window's table to read into: first token that later tokens attend to. Where the producer's blocks
            are smaller they may begin as late as this; the tokens before it are then left as they are.
    """

    ids: BlockIds | Sequence[int]
    first_token: int = 0
    needed_from: int = 0


@dataclass(frozen=True, eq=False)
class CheckedTable:
    """Block table that was checked against its group.

    Attributes:
        ids, needed_from: see `BlockTable`.
        first_token: first token of the first block, a multiple of ``tokens``.
        tokens: number of tokens of one entry.
        bound: upper bound of the ids, exclusive; 0 if it is not known.
        lacking: tokens at the beginning of the first block that are not the request's.
    """

    ids: BlockIds
    first_token: int
    tokens: int
    bound: int = 0
    needed_from: int = 0
    lacking: int = 0

    @property
    def begins_at(self) -> int:
        """First token of the request that the blocks hold."""
        return self.first_token + self.lacking

    @property
    def end_token(self) -> int:
        """First token after the last block's."""
        return self.first_token + len(self.ids) * self.tokens

    @cached_property
    def repeats(self) -> bool:
        """Whether some id is given more than once."""
        ids = self.ids
        if len(ids) < 2 or all(_ascend(ids[one]) for one in pieces(len(ids), overlap=1)):
            return False
        # np.sort would release the lock.
        bound = self.bound or _largest(ids) + 1
        if len(ids) <= _KEEPS_LOCK or bound > _MOST_PLACES:
            return len(set(ids.tolist())) < len(ids)
        # Of equal ids only the last is found at its entry. This takes half the time of a set.
        numbers = _NUMBERS[: len(ids)] if len(ids) <= len(_NUMBERS) else np.arange(len(ids), dtype=_NUMBERS.dtype)
        parts = [(ids[one], numbers[one]) for one in pieces(len(ids))]
        last = np.empty(bound, dtype=_NUMBERS.dtype)
        for part, places in parts:
            last[part] = places
        return not all((last[part] == places).all() for part, places in parts)


def check_tables(
    spec: CacheSpec, blocks: Any, whose: str = "", *, first_token: int = 0, distinct: bool = False
) -> list[CheckedTable]:
    """Check the block tables of one request, one for each cache group.

    Args:
        spec: description of the cache that the ids index.
        blocks: a block table, or its ids, for each group; for a cache of one group also the table or the ids alone.
        whose: part of the message, such as ``"source"``.
        first_token: first token of tables given as ids, rounded down to the beginning of a block.
        distinct: whether to refuse an id that is given twice.

    Raises:
        BlockError: these are not blocks of this cache.
    """
    groups = spec.groups
    several = len(groups) > 1
    if not several and not (_is_list(blocks) and len(blocks) and _is_table(blocks[0])):
        blocks = (blocks,)
    elif not _is_list(blocks) or len(blocks) != len(groups):
        raise BlockError(f"{whose} block ids must be given for each of {len(groups)} cache groups".lstrip())
    made = []
    for given, group in zip(blocks, groups, strict=True):
        where = f" of group {group.name!r}" if several else ""
        tokens, needed_from, lacking = group.table_tokens, 0, 0
        if isinstance(given, BlockTable):
            table, first, lacking = given.ids, *_first(given.first_token, group, where)
            needed_from = _token(given.needed_from, "first needed token", where) if given.needed_from else 0
        else:
            table, first = given, _first(first_token // tokens * tokens, group, where)[0] if first_token else 0
        ids = _ids(table, group.num_blocks, f"{whose} block".lstrip(), where)
        checked = CheckedTable(ids, first, tokens, group.num_blocks, needed_from, lacking)
        if distinct and checked.repeats:
            raise BlockError(f"a {whose} block{where} is given twice".replace("  ", " "))
        made.append(checked)
    return made


def ids_to_wire(ids: BlockIds) -> bytes:
    """Encode ids as little-endian uint32."""
    return _cast(ids, np.dtype("<u4")).tobytes()


def ids_from_wire(raw: bytes) -> BlockIds:
    """Decode ids of `ids_to_wire`. Raises BlockError: there is no whole number of ids."""
    if len(raw) % 4:
        raise BlockError(f"a list of block ids has {len(raw)} bytes")
    return _cast(np.frombuffer(raw, dtype="<u4"), np.dtype(np.int64))


def pieces(number: int, *, overlap: int = 0) -> Iterator[slice]:
    """Slices of ``number`` elements, each short enough that NumPy keeps the interpreter's lock."""
    return (slice(begin, begin + _KEEPS_LOCK + overlap) for begin in range(0, number, _KEEPS_LOCK))


def _array(blocks: Any) -> npt.NDArray[Any]:
    if isinstance(blocks, list) and blocks and type(blocks[0]) is int:
        try:  # a quarter of the time of np.asarray
            return np.frombuffer(struct.pack(f"{len(blocks)}q", *blocks), dtype=np.int64)
        except struct.error:
            pass  # np.asarray raises the error
    return np.asarray(blocks)


def _largest(numbers: npt.NDArray[Any]) -> int:
    if len(numbers) <= _KEEPS_LOCK:
        return int(np.maximum.reduce(numbers))
    return max(int(np.maximum.reduce(numbers[one])) for one in pieces(len(numbers)))


def _ascend(ids: npt.NDArray[Any]) -> bool:
    return bool(np.logical_and.reduce(ids[1:] > ids[:-1]))


def _cast(ids: npt.NDArray[Any], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    cast = np.empty(len(ids), dtype)
    for one in pieces(len(ids)):
        cast[one] = ids[one]
    return cast


def _first(token: Any, group: CacheGroup, where: str) -> tuple[int, int]:
    """(first token of the first block, number of its tokens that are not the request's)."""
    if group.kind == "state":
        return 0, 0
    first = _token(token, "first token", where)
    lacking = first % group.table_tokens
    if not 0 <= first < MAX_TOKENS or (lacking and group.kind != "sliding_window"):
        raise BlockError(f"no block of {group.table_tokens} tokens{where} begins with token {first}")
    return first - lacking, lacking


def _token(token: Any, what: str, where: str) -> int:
    try:
        return index(token)
    except TypeError as error:
        raise BlockError(f"the {what}{where} is no whole number but {type(token).__name__}") from error


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple, range)) or (isinstance(value, np.ndarray) and value.ndim > 0)


def _is_table(value: Any) -> bool:
    return isinstance(value, BlockTable) or _is_list(value)


def _ids(blocks: Any, num_blocks: int, block: str, where: str) -> BlockIds:
    try:
        ids = _array(blocks)
    except (ValueError, TypeError, OverflowError) as error:
        raise BlockError(f"{block}s{where} are no list of integers: {error}") from error
    if ids.ndim != 1:
        raise BlockError(f"{block}s{where} are no list of integers")
    if not ids.size:
        return np.empty(0, dtype=np.int64)
    if ids.dtype.kind not in "iu":
        raise BlockError(f"{block}s{where} are no integers but {ids.dtype}")
    checked: BlockIds = ids if ids.dtype == np.int64 else _cast(ids, np.dtype(np.int64))
    # As unsigned numbers, negative ids are larger than any cache: one comparison finds both.
    if _largest(checked.view(np.uint64)) >= num_blocks:
        low, high = int(ids.min()), int(ids.max())
        raise BlockError(f"{block} {low if low < 0 else high}{where} is not one of {num_blocks}")
    return checked
