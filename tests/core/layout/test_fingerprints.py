# SPDX-License-Identifier: Apache-2.0
"""Fingerprints of named facts: equal for equal facts, and where they differ, by name."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvxfer.layout.checks import MAX_TEXT, check_text
from kvxfer.layout.fingerprints import compared, differences, of_facts, with_fact

NAMES = st.text("abc xyz", min_size=1, max_size=12).filter(str.strip)
VALUES = st.text(st.characters(codec="utf-8"), max_size=100)
FACTS = st.dictionaries(NAMES, VALUES, max_size=12)


@given(FACTS, FACTS)
def test_equal_facts_and_only_they_make_equal_fingerprints(one, other):
    """Any facts make a text that a peer accepts; it is equal for equal facts in any order, whatever the hint, and for no others."""
    text = of_facts(one, "a hint")
    check_text("the fingerprint", text)
    assert compared(text) == compared(of_facts(dict(reversed(one.items())), "another ~ hint"))
    assert (compared(text) == compared(of_facts(other))) == (one == other)
    assert not differences(text, of_facts(one))


@given(FACTS, NAMES, VALUES, VALUES)
def test_the_difference_is_told_by_name(facts, name, here, there):
    """Where one fact differs, the difference has its name, unless there is no room even for the digests of all facts."""
    source, target = (of_facts({**facts, name: value}) for value in (here, there))
    found = [each[0] for each in differences(source, target)]
    fits = len("facts/1 " + "; ".join(f"{each}=#0123456789ab" for each in {**facts, name: ""})) <= MAX_TEXT
    assert found == ([] if here == there else [name]) or not fits
    assert bool(found) == (here != there)


def test_values_and_hints_of_both_sides():
    """Short values stand in the difference as they are, with the hint of their side; a fact of one side only is told, too."""
    source = of_facts({"rope theta": "10000", "dtype": "float32"}, "small")
    target = with_fact(of_facts({"rope theta": "500000", "dtype": "float32"}), "stored as", "bytes")
    assert differences(source, target) == [
        ("rope theta", "10000 (small)", "500000"),
        ("stored as", "nothing (small)", "bytes"),
    ]


def test_fingerprints_without_facts():
    """A text of an engine's own, or of an older version, is compared as a whole; against facts the message tells the reason."""
    assert not differences("my model ~ 1", "my model ~ 1")
    assert differences("my model ~ 1", "my model ~ 2")[0][0] == "fingerprint"
    ((axis, here, there),) = differences("vllm:1f", of_facts({"dtype": "float32"}))
    assert axis == "fingerprint" and "another version of kvxfer" in here and "facts" in there
    assert with_fact("f", "stored as", "bytes") == "f stored as bytes"
