# SPDX-License-Identifier: Apache-2.0
"""Limits of what a description of a cache may say, and checks of its fields. Descriptions come from untrusted peers."""

from __future__ import annotations

import string
from typing import Final

from kvxfer.errors import LayoutError

MAX_ADDRESS: Final = 1 << 63
"""Greatest end of a region, so that sums of addresses and strides fit in 64 bits everywhere."""
MAX_BLOCKS: Final = 1 << 31
MAX_GROUPS: Final = 64
MAX_REGIONS: Final = 4096
MAX_SMALL_EXTENT: Final = 1 << 20
"""Most layers, heads or tokens of a block: far more than any model has, and few enough that sums do not overflow."""
MAX_LAYERS: Final = 4096
"""Most layers of one region. The cost of a description grows with them."""
MAX_CELLS: Final = 1 << 14
"""Most layers times components of one rank."""
MAX_KERNEL_BLOCKS: Final = 1 << 16
"""Most blocks of a region for one entry of the block table."""
MAX_CACHE_NBYTES: Final = 1 << 50
"""Largest cache of one rank: more than any machine has."""
MAX_RANKS: Final = 1024
"""Most ranks of one engine; a lease names the address of each."""
MAX_TEXT: Final = 256
"""Longest group name or fingerprint, in characters."""


def check_kind(what: str, value: object, kind: type | tuple[type, ...]) -> None:
    """Refuse a value of another class: a decoder checks classes, a constructor does not. Raises LayoutError."""
    if not isinstance(value, kind):
        one = kind[0] if isinstance(kind, tuple) else kind
        raise LayoutError(f"{what} must be of class {one.__name__}, not {type(value).__name__}: {value!r:.80}")


def check_all(what: str, values: object, kind: type) -> None:
    """Refuse anything but a tuple of ``kind``. Raises LayoutError."""
    check_kind(what, values, tuple)
    for value in values:  # type: ignore[attr-defined]
        check_kind(f"one of {what}", value, kind)


def check_int(what: str, value: object, low: int, high: int) -> None:
    """Refuse anything but an integer from ``low`` to ``high``. Raises LayoutError."""
    if type(value) is not int:  # NumPy integers wrap around, and True is no count
        raise LayoutError(f"{what} is not an integer: {value!r}")
    if not low <= value <= high:
        raise LayoutError(f"{what} is out of range: {value}")


_TEXT: Final = frozenset(string.ascii_letters + string.digits + string.punctuation + " ")


def check_text(what: str, value: object) -> None:
    """Refuse long texts and control characters: names of peers reach logs and terminals. Raises LayoutError."""
    if not isinstance(value, str) or len(value) > MAX_TEXT or not _TEXT.issuperset(value):
        raise LayoutError(f"{what} must be at most {MAX_TEXT} printable ASCII characters")
