# SPDX-License-Identifier: Apache-2.0
"""A finding: one sentence about this machine or a peer, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class State(str, Enum):
    """Weight of a finding."""

    GOOD = "ok"
    NOTE = "note"
    """It works, less well than it could, or only for some pairs."""
    PROBLEM = "problem"
    """Transfers fail, or would."""


@dataclass(frozen=True)
class Finding:
    """The result of one look.

    Attributes:
        subject: what was looked at, in a word or two.
        text: what was found.
        fix: what to do, as a line that can be pasted where there is one; empty if nothing has to be done.
    """

    state: State
    subject: str
    text: str
    fix: str = ""


def good(subject: str, text: str) -> Finding:
    """A finding that asks for nothing."""
    return Finding(State.GOOD, subject, text)


def note(subject: str, text: str, fix: str = "") -> Finding:
    """A finding about what could be better."""
    return Finding(State.NOTE, subject, text, fix)


def problem(subject: str, text: str, fix: str = "") -> Finding:
    """A finding for which transfers fail."""
    return Finding(State.PROBLEM, subject, text, fix)
