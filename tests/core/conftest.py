# SPDX-License-Identifier: Apache-2.0
"""A world of virtual endpoints for each test, and real ones that are closed when the test ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.core.engine import Engine, ShardedEngine
from tests.core.protocol.virtual import World

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.core.protocol.virtual import Node


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


@pytest.fixture
def engines() -> Iterator[Callable[..., Engine]]:
    """Makes engines of one rank, each with other content."""
    made: list[Engine] = []

    def make(**more: object) -> Engine:
        made.append(Engine(len(made), **more))
        return made[-1]

    yield make
    for engine in made:
        engine.endpoint.close()
        assert engine.endpoint.metrics.value("kvxfer_internal_errors_total") == 0


@pytest.fixture
def sharded() -> Iterator[Callable[..., ShardedEngine]]:
    """Makes engines of several ranks, which share the KV heads."""
    made: list[ShardedEngine] = []

    def make(name: str, world: int = 1, **more: object) -> ShardedEngine:
        made.append(ShardedEngine(name, world, **more))
        return made[-1]

    yield make
    for engine in made:
        engine.close()
        for rank in engine.ranks:
            assert rank.endpoint.metrics.value("kvxfer_internal_errors_total") == 0
            assert rank.endpoint.in_use()["slots"] == 0
