# SPDX-License-Identifier: Apache-2.0
"""Steps of a `Write` on the wire: for each span its address at the producer, its address at the consumer, and its length.

Each is a little-endian unsigned number of 8 bytes; all first addresses come first, then all second ones, then all lengths.
"""

from __future__ import annotations

import numpy as np

from kvxfer.errors import DescriptorError, WireError
from kvxfer.memory.spans import Descriptors

SPAN_NBYTES = 24


def to_wire(spans: Descriptors) -> bytes:
    """Encode spans of a consumer, whose own addresses are the local ones."""
    return np.concatenate((spans.remote, spans.local, spans.nbytes)).astype("<u8", copy=False).tobytes()


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
