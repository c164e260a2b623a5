# SPDX-License-Identifier: Apache-2.0
"""NIXL's own metadata with mutations: refused with a named error, or the process that reads it dies and this one does not."""

from __future__ import annotations

import random

from tests.nixl.mutated_metadata import broken, mutated, trial


def test_mutated_metadata():
    """Each of sixty mutations is refused by an error of ours or harmless; nothing else is raised, and nothing hangs."""
    outcomes = trial(60, seed=3)
    assert broken(outcomes) == []
    assert sum(outcomes.values()) >= 60


def test_mutations_change_something():
    """Nearly every one differs from what it was made of, and no two runs of one seed differ."""
    data = random.Random(0).randbytes(600)
    made = [mutated(random.Random(f"1 {number}"), data) for number in range(200)]
    assert made == [mutated(random.Random(f"1 {number}"), data) for number in range(200)]
    assert sum(each != data for each in made) > 180
