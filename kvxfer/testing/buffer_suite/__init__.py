# SPDX-License-Identifier: Apache-2.0
"""The conformance suite of device buffers: `BufferSuite`, its tests by subject, and what they share."""

from kvxfer.testing.buffer_suite.fixtures import MadeBuffer
from kvxfer.testing.buffer_suite.suite import BufferSuite

__all__ = ["BufferSuite", "MadeBuffer"]
