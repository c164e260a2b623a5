# SPDX-License-Identifier: Apache-2.0
"""Fingerprints that are made of named facts, so that a pair that differs is told in which.

A fingerprint is any text. One that this module makes reads ``facts/1 rope theta=10000; dtype=float32 ~ a hint``: the facts are
compared, the hint is for people.
"""

from __future__ import annotations

import hashlib
import string
from typing import TYPE_CHECKING, Final

from kvxfer.layout.checks import MAX_TEXT

if TYPE_CHECKING:
    from collections.abc import Mapping

_MARK, _BETWEEN, _IS, _HINT = "facts/1 ", "; ", "=", " ~ "
_PLAIN: Final = frozenset(string.ascii_letters + string.digits + string.punctuation + " ") - frozenset(";=~")
_MOST_VALUE = 64
_MOST_HINT = 40


def of_facts(facts: Mapping[str, str], hint: str = "") -> str:
    """Fingerprint of these facts: equal for equal facts, and for no others.

    Values that are long, or too many for the length of a fingerprint, are replaced by their digests.

    Args:
        facts: by name, of letters, digits and spaces.
        hint: for people, such as a name of the model; not compared, and left out where there is no room.
    """
    plain = {name: _plain(value) for name, value in facts.items()}
    while len(text := _joined(plain)) > MAX_TEXT:
        longest = max(plain, key=lambda name: (len(plain[name]), name))
        if len(plain[longest]) <= len(_digest("")):
            return f"{_MARK}all{_IS}{_digest(text)}"
        plain[longest] = _digest(facts[longest])
    said = "".join(each if each in _PLAIN else "_" for each in hint[-_MOST_HINT:])
    return f"{text}{_HINT}{said}" if said and len(text) + len(_HINT) + len(said) <= MAX_TEXT else text


def with_fact(fingerprint: str, name: str, value: str) -> str:
    """Fingerprint with one fact more; of a text without facts, the text and the fact."""
    facts = _facts_of(fingerprint)
    if facts is None:
        return f"{fingerprint} {name} {value}"
    return of_facts({**facts, name: value}, hint=fingerprint.partition(_HINT)[2])


def compared(fingerprint: str) -> str:
    """Part of a fingerprint that has to be equal: all but the hint."""
    return fingerprint.partition(_HINT)[0] if fingerprint.startswith(_MARK) else fingerprint


def differences(source: str, target: str) -> list[tuple[str, str, str]]:
    """Name and both values of each fact in which two fingerprints differ.

    The name is ``"fingerprint"`` where one of them is not made of facts, as those of older versions of kvxfer.
    """
    if compared(source) == compared(target):
        return []
    here, there = _facts_of(source), _facts_of(target)
    if here is None or there is None:
        return [("fingerprint", _told(source), _told(target))]
    hints = [f" ({hint})" if hint else "" for hint in (each.partition(_HINT)[2] for each in (source, target))]
    found = [
        (name, here.get(name, "nothing") + hints[0], there.get(name, "nothing") + hints[1])
        for name in sorted(here.keys() | there.keys())
        if not _alike(here.get(name), there.get(name))
    ]
    return found or [("fingerprint", _told(source), _told(target))]


def _alike(one: str | None, other: str | None) -> bool:
    """Whether two values are of one value, which may have been replaced by its digest on one side, where there was less room."""
    if one is None or other is None or one == other:
        return one == other
    digest, value = sorted((one, other), key=len)
    return value.endswith(digest) or digest == _digest(value) if digest.startswith("#") else False


def _told(fingerprint: str) -> str:
    if _facts_of(fingerprint) is not None:
        return repr(fingerprint)
    return f"{fingerprint!r}, which names no facts of its model (another version of kvxfer, or another engine)"


def _facts_of(fingerprint: str) -> dict[str, str] | None:
    text = compared(fingerprint)
    if not text.startswith(_MARK):
        return None
    facts = [each.partition(_IS) for each in text.removeprefix(_MARK).split(_BETWEEN)]
    return {name: value for name, _, value in facts}


def _joined(facts: Mapping[str, str]) -> str:
    return _MARK + _BETWEEN.join(f"{name}{_IS}{value}" for name, value in sorted(facts.items()))


def _plain(value: str) -> str:
    """Return the value if it is short and has no character with a meaning here, else its beginning and its digest."""
    if len(value) <= _MOST_VALUE and _PLAIN.issuperset(value):
        return value
    return "".join(each for each in value[: _MOST_VALUE // 2] if each in _PLAIN) + _digest(value)


def _digest(text: str) -> str:
    return f"#{hashlib.blake2b(text.encode(), digest_size=6).hexdigest()}"
