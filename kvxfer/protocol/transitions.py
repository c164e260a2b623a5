# SPDX-License-Identifier: Apache-2.0
"""State machines as tables of transitions, by which the protocol runs and from which docs/protocol.md draws its diagrams. Pure, no I/O."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Sequence

_State = TypeVar("_State", bound=Enum)
_Event = TypeVar("_Event", bound=Enum)


@dataclass(frozen=True)
class Transition(Generic[_State, _Event]):
    """One row: in any of these states, this event leads to that state.

    Attributes:
        target: None if the state stays as it is.
        cause: what happens, with its guard, as the diagram says it; what is sent or told stands after a slash.
    """

    sources: tuple[_State, ...]
    event: _Event
    target: _State | None
    cause: str


class TransitionTable(Generic[_State, _Event]):
    """All transitions of one state machine. An event for which a state has no row changes nothing.

    Args:
        start: the state of what is not known; ``ends`` are the states that nothing leaves.
    """

    def __init__(self, start: _State, ends: Sequence[_State], *rows: Transition[_State, _Event]) -> None:
        self.start: _State = start
        self.ends: frozenset[_State] = frozenset(ends)
        self.rows: Sequence[Transition[_State, _Event]] = rows
        self._targets: dict[tuple[_State, _Event], _State] = {}
        for row in rows:
            for source in row.sources:
                if (source, row.event) in self._targets:
                    raise ValueError(f"two transitions from {source.name} by {row.event.name}")
                self._targets[source, row.event] = source if row.target is None else row.target

    def after(self, state: _State, event: _Event) -> _State | None:
        """State to which an event leads; None if the state has no row for the event."""
        return self._targets.get((state, event))
