# SPDX-License-Identifier: Apache-2.0
"""Shapes of arrays for the buffer suite, which asks for memory by its size."""

from __future__ import annotations

import math


def shape_of(nbytes: int, itemsize: int = 2) -> tuple[int, ...] | None:
    """Shape of blocks, tokens and heads that takes ``nbytes``, the more axes the better; None if no such shape does."""
    for tail in ((16, 4, 32), (5, 8), (3,)):
        blocks, rest = divmod(nbytes, math.prod(tail) * itemsize)
        if not rest:
            return blocks, *tail
    return None
