# SPDX-License-Identifier: Apache-2.0
"""The staging arena: a hard limit, shared by two uses that cannot starve each other, and lines in which transfers take turns."""

from __future__ import annotations

import ctypes

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvxfer.runtime.staging import FairQueue, StagingArena, Use

LEAST = 1 << 15


def fill(arena, use):
    """All slots that one use can have."""
    slots = []
    while (slot := arena.take(use)) is not None:
        slots.append(slot)
    return slots


@pytest.mark.parametrize("nbytes", [LEAST, LEAST + 4095, 100_000, 1 << 20, 33 << 20, (1 << 26) + 12_345])
def test_slots_are_pages_inside_the_limit(nbytes):
    """Slots are whole pages of at most 8 MiB, do not overlap, lie in the registered memory, and are no more than the limit."""
    arena = StagingArena(nbytes)
    assert arena.slots >= 8 and arena.slots * arena.slot_nbytes == arena.memory.nbytes <= nbytes
    assert arena.slot_nbytes % 4096 == 0 and 4096 <= arena.slot_nbytes <= 8 << 20
    slots = sorted([*fill(arena, Use.OUTGOING), *fill(arena, Use.LANDING)])
    assert slots == [arena.memory.address + i * arena.slot_nbytes for i in range(arena.slots)]
    assert arena.memory.address % 4096 == 0
    # Most of the limit can be used.
    assert arena.memory.nbytes > nbytes * 0.75


def test_a_device_may_want_longer_chunks():
    """Slots are as long as the device packs well, as long as there are 8 of them within the limit."""
    assert StagingArena(256 << 20, 32 << 20).slot_nbytes == 32 << 20
    assert StagingArena(64 << 20, 32 << 20).slot_nbytes == 8 << 20


def test_the_limit_is_hard():
    """No use gets a slot when all are taken, until one is given back."""
    arena = StagingArena(LEAST)
    slots = [*fill(arena, Use.OUTGOING), *fill(arena, Use.LANDING)]
    assert len(slots) == arena.in_use == arena.peak == arena.slots == 8
    assert arena.take(Use.OUTGOING) is None and arena.take(Use.LANDING) is None
    arena.give(slots[3])
    assert arena.in_use == 7 and arena.peak == 8
    assert arena.take(Use.OUTGOING) == slots[3] and arena.take(Use.OUTGOING) is None


@pytest.mark.parametrize(("greedy", "other"), [(Use.OUTGOING, Use.LANDING), (Use.LANDING, Use.OUTGOING)])
def test_one_slot_is_kept_for_the_other_use(greedy, other):
    """However many chunks one use would like, the other one always finds a slot, and finds it again when it gave it back."""
    arena = StagingArena(LEAST)
    held = fill(arena, greedy)
    assert len(held) == arena.slots - 1
    for _ in range(3):
        slot = arena.take(other)
        assert slot is not None and arena.take(other) is None and arena.take(greedy) is None
        arena.give(slot)
        assert arena.take(greedy) is None
    arena.give(held[0])
    assert arena.take(greedy) is not None and arena.take(greedy) is None and arena.take(other) is not None


def test_the_warmest_slot_is_used_first():
    """The slot given back last is taken next: its pages are there, and in the processor's caches."""
    arena = StagingArena(LEAST)
    first, second = arena.take(Use.OUTGOING), arena.take(Use.OUTGOING)
    arena.give(second)
    arena.give(first)
    assert arena.take(Use.LANDING) == first and arena.take(Use.LANDING) == second
    assert arena.peak == 2


def test_a_view_is_the_slots_memory():
    """Bytes that are written into a view lie at the slot's address, and nowhere else."""
    arena = StagingArena(LEAST)
    slots = fill(arena, Use.LANDING)
    for number, slot in enumerate(slots):
        arena.view(slot, arena.slot_nbytes)[:] = number + 1
    for number, slot in enumerate(slots):
        assert set(ctypes.string_at(slot, arena.slot_nbytes)) == {number + 1}
    assert len(arena.view(slots[0], 100)) == 100 and arena.view(slots[0], 100).flags.c_contiguous


@given(st.lists(st.tuples(st.sampled_from(Use), st.integers(0, 9))))
def test_slots_are_never_shared(choices):
    """A slot is lent once at a time, and all are accounted for, in any order of loans and returns."""
    arena, held, peak = StagingArena(LEAST), [], 0
    for use, choice in choices:
        if choice < 6:
            slot = arena.take(use)
            mine = [s for s, u in held if u is use]
            if len(held) == arena.slots or len(mine) == arena.slots - 1:
                assert slot is None
            else:
                assert slot is not None and slot not in [s for s, _ in held]
                held.append((slot, use))
        elif held:
            arena.give(held.pop(choice % len(held))[0])
        peak = max(peak, len(held))
        assert (arena.in_use, arena.peak) == (len(held), peak)


# -- who is next ---------------------------------------------------------------------------------------------------------


def test_transfers_take_turns():
    """One that asks for much does not keep others waiting: each transfer has its turn, in order within itself."""
    line = FairQueue()
    for number in range(100):
        line.put("long", ("long", number))
    for number in range(2):
        line.put("short", ("short", number))
        line.put("other", ("other", number))
    assert [line.take() for _ in range(6)] == [
        ("long", 0),
        ("short", 0),
        ("other", 0),
        ("long", 1),
        ("short", 1),
        ("other", 1),
    ]
    assert [line.take()[1] for _ in range(98)] == list(range(2, 100))
    assert not line


def test_who_comes_again_stands_last():
    """A transfer that had its turn and puts something new waits for the others."""
    line = FairQueue()
    line.put("a", "a1")
    line.put("b", "b1")
    assert line.take() == "a1"
    line.put("a", "a2")
    assert [line.take(), line.take()] == ["b1", "a2"]


def test_dropping_one_line():
    """A transfer that is over leaves its line, whose items are handed back; the others go on."""
    line = FairQueue()
    for item in ("a1", "b1", "a2"):
        line.put(item[0], item)
    assert line.drop("a") == ["a1", "a2"] and line.drop("a") == [] and line.drop("never there") == []
    assert line.take() == "b1" and not line


def test_nobody_waits():
    """An empty queue says so."""
    with pytest.raises(KeyError):
        FairQueue().take()


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3))))
def test_nobody_is_forgotten_or_overtaken(steps):
    """Whatever the order, each item comes out once, in order within its line, and no line is passed over twice in a row."""
    line, waiting, number = FairQueue(), {"a": [], "b": [], "c": []}, 0
    passed = dict.fromkeys(waiting, 0)
    for whose, choice in steps:
        if choice < 2:
            line.put(whose, (whose, number))
            waiting[whose].append((whose, number))
            number += 1
        elif choice == 2 and line:
            got = line.take()
            assert waiting[got[0]].pop(0) == got
            for other, items in waiting.items():
                passed[other] = 0 if other == got[0] or not items else passed[other] + 1
                assert passed[other] <= 2  # two others
        elif choice == 3:
            assert line.drop(whose) == waiting[whose]
            waiting[whose], passed[whose] = [], 0
        assert bool(line) == any(waiting.values())
