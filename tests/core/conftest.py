# SPDX-License-Identifier: Apache-2.0
"""A world of virtual endpoints for each test, and real ones that are closed when the test ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.core.virtual import World

if TYPE_CHECKING:
    from tests.core.virtual import Node


@pytest.fixture
def world() -> World:
    """Empty, with a perfect network."""
    return World()


@pytest.fixture
def producer(world) -> Node:
    """A producer with default settings."""
    return world.node("producer")


@pytest.fixture
def consumer(world) -> Node:
    """A consumer with default settings."""
    return world.node("consumer")
