# SPDX-License-Identifier: Apache-2.0
"""The frame of NIXL's metadata, checked before NIXL reads it.

NIXL 1.5 trusts the lengths and counts in it, and wrong ones can end the process (SIGSEGV, SIGABRT). NIXL also registers the
agent that is named inside, before a caller can ask which one it is. The frame::

    nixlSerDes|  field...          field: tag, length as 8 bytes, value, |
    Agent        name
    Conns        number of them    each: t backend, c how it connects
    (no tag)     MemSection
    nixlSecElms  number of them    each: bknd backend, nixlDList nixlSDList, t kind, n number of regions,
                                         and without a tag each region: address, length, device, key

The contents of a connection and of a key belong to the backend and are not looked at.
"""

from __future__ import annotations

import struct

_INTRO = b"nixlSerDes|"
_LENGTH = struct.Struct("<Q")
_REGION_NBYTES = 24


def agent_name(metadata: bytes) -> str:
    """Name of the agent that metadata belongs to.

    Raises:
        ValueError: the metadata is not well-formed, with the reason.
    """
    fields = _Fields(metadata)
    name = fields.text("Agent")
    for _ in range(fields.number("Conns")):
        fields.text("t")
        fields.value("c")
    if fields.text("") != "MemSection":
        raise ValueError("its memory section does not begin where it should")
    for _ in range(fields.number("nixlSecElms")):
        fields.text("bknd")
        if fields.text("nixlDList") != "nixlSDList":
            raise ValueError("its regions are no list of the kind that is expected")
        if len(fields.value("t")) != struct.calcsize("<I"):
            raise ValueError("the kind of its memory is not a number")
        for _ in range(fields.number("n")):
            if len(fields.value("")) < _REGION_NBYTES:
                raise ValueError("a region has no address, length and device")
    fields.end()
    return name


class _Fields:
    """Reader of one field after another."""

    def __init__(self, metadata: bytes) -> None:
        if not metadata.startswith(_INTRO):
            raise ValueError("it does not begin as NIXL's metadata does")
        self._data = metadata
        self._at = len(_INTRO)

    def value(self, tag: str) -> bytes:
        begin = self._at + len(tag) + _LENGTH.size
        if not self._data.startswith(tag.encode(), self._at) or begin > len(self._data):
            raise ValueError(f"it has no field {tag!r} where it should")
        (length,) = _LENGTH.unpack_from(self._data, self._at + len(tag))
        end = begin + length
        if self._data[end : end + 1] != b"|":
            raise ValueError(f"its field {tag!r} does not end where its length says")
        self._at = end + 1
        return self._data[begin:end]

    def text(self, tag: str) -> str:
        return self.value(tag).decode()  # UnicodeDecodeError is a ValueError

    def number(self, tag: str) -> int:
        value = self.value(tag)
        if len(value) != _LENGTH.size:
            raise ValueError(f"its field {tag!r} is not a number")
        (number,) = _LENGTH.unpack(value)
        if number > len(self._data) // _LENGTH.size:
            raise ValueError(f"it says that it has {number} of {tag!r}, for which it is too short")
        return int(number)

    def end(self) -> None:
        if self._at != len(self._data):
            raise ValueError(f"{len(self._data) - self._at} bytes follow its end")
