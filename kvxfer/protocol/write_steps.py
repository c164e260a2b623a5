# SPDX-License-Identifier: Apache-2.0
"""Steps of a `Write` on the wire: for each span its address at the producer, its address at the consumer, and its length.

Each is a little-endian unsigned number of 8 bytes; all first addresses come first, then all second ones, then all lengths.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvxfer.errors import DescriptorError, WireError
from kvxfer.memory.spans import Descriptors

if TYPE_CHECKING:
    from collections.abc import Sequence

SPAN_NBYTES = 24
MOST_SPANS = 16_384
"""In one `Write`, which has at most 384 KiB with them; fewer where messages have to be shorter."""
MOST_NBYTES = 1 << 34
"""Bytes that one `Write` moves."""


def to_wire(spans: Descriptors) -> bytes:
    """Encode spans of a consumer, whose own addresses are the local ones."""
    return np.concatenate((spans.remote, spans.local, spans.nbytes)).astype("<u8", copy=False).tobytes()


def all_from_wire(steps: Sequence[bytes]) -> list[Descriptors]:
    """Decode the steps of one `Write`.

    Raises:
        WireError: these are no spans, or are more than one `Write` may have.
    """
    spans = sum(map(len, steps)) // SPAN_NBYTES
    if spans > MOST_SPANS:
        raise WireError(f"one write has {spans} spans, more than {MOST_SPANS}")
    decoded = [from_wire(step) for step in steps]
    longest = max(int(each.nbytes.max()) for each in decoded)
    nbytes = max(longest, sum(each.total_nbytes for each in decoded))  # a sum of longer spans could wrap around
    if nbytes > MOST_NBYTES:
        raise WireError(f"one write moves {nbytes} bytes, more than {MOST_NBYTES}")
    return decoded


def from_wire(step: bytes) -> Descriptors:
    """Decode what the producer has to write: its own addresses are the local ones.

    Raises:
        WireError: these are no spans.
    """
    if not step or len(step) % SPAN_NBYTES:
        raise WireError(f"{len(step)} bytes are no list of spans")
    local, remote, nbytes = np.frombuffer(step, dtype="<u8").astype(np.uint64, copy=False).reshape(3, -1)
    try:
        return Descriptors(local, remote, nbytes)
    except DescriptorError as error:
        raise WireError(str(error)) from error
