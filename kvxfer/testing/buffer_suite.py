# SPDX-License-Identifier: Apache-2.0
"""`BufferSuite`: what the buffers of every device have to pass before they hold a cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from kvxfer.testing._buffer_bytes import BytesTests
from kvxfer.testing._buffer_casts import CastTests
from kvxfer.testing._buffer_contract import ContractTests
from kvxfer.testing._buffer_stage import MadeBuffer
from kvxfer.testing.suite import Suite

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["BufferSuite", "MadeBuffer"]


class BufferSuite(BytesTests, CastTests, ContractTests, Suite):
    """Subclass it in a test module, name the way to make a buffer, and run pytest.

    Casts that the device does not declare (`DeviceBuffer.can_cast`) are skipped, with the reason.

    Attributes:
        make_buffer: nbytes -> `MadeBuffer` of exactly that size, as a ``staticmethod``. The buffer alone has to keep its
            memory alive: the suite drops the rest.
        deviations: see `Suite`.
    """

    settings: ClassVar[frozenset[str]] = Suite.settings | {"make_buffer"}

    make_buffer: ClassVar[Callable[[int], MadeBuffer]]
