# SPDX-License-Identifier: Apache-2.0
"""`BufferSuite`: the tests that the buffers of every device must pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from kvxfer.testing.buffer_suite.casts import CastTests
from kvxfer.testing.buffer_suite.contract import BufferContractTests
from kvxfer.testing.buffer_suite.copies import CopyTests
from kvxfer.testing.conformance import ConformanceSuite

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvxfer.testing.buffer_suite.fixtures import MadeBuffer


class BufferSuite(CopyTests, CastTests, BufferContractTests, ConformanceSuite):
    """Subclass it in a test module, name the way to make a buffer, and run pytest.

    Casts that the device does not declare (`DeviceBuffer.can_cast`) are skipped, with the reason.

    Attributes:
        make_buffer: nbytes -> `MadeBuffer` of exactly that size, as a ``staticmethod``. The buffer must keep its memory
            alive: the suite drops all other references.
        deviations: see `ConformanceSuite`.
    """

    settings: ClassVar[frozenset[str]] = ConformanceSuite.settings | {"make_buffer"}

    make_buffer: ClassVar[Callable[[int], MadeBuffer]]
