# SPDX-License-Identifier: Apache-2.0
"""Inputs made from others: a value inside is changed, or bytes are. Any `random.Random` decides, hypothesis' and atheris' too."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from random import Random

NUMBERS = (
    0, 1, -1, 2, 7, 16, 127, 128, 255, 256, 1 << 15, (1 << 16) - 1, 1 << 20, (1 << 31) - 1, 1 << 31, 1 << 32, 1 << 40,
    (1 << 40) + 1, (1 << 62), (1 << 63) - 1, 1 << 63, (1 << 64) - 1, -(1 << 63), 0.5, -0.0, 1e-300, 1e300,
)  # fmt: skip
TEXTS = (
    "", "0", "a", "k", "v", "kv", "latent", "state", "float16", "bfloat16", "float8_e4m3fn", "HND", "tcp://h:1", "tcp://[::1]:99999",
    "\0", "\n", "\x1b[31m", "é", "\u2028", "x" * 300, "x" * 5000, "ab" * 16, "ab" * 16 + "\n", "NaN", "1e400", "-1", "../x", "=", "'",
)  # fmt: skip
DEEP = 40


def mutated(random: Random, data: bytes, form: str, others: Sequence[bytes] = ()) -> bytes:
    """Another input, most often one that is nearly well-formed.

    Args:
        form: ``"msgpack"``, ``"json"`` or ``"bytes"``.
        others: inputs from which parts may be taken.
    """
    read, write = _FORMS.get(form, (None, None))
    if read is not None and write is not None and random.randrange(8):
        try:
            value = read(data)
            for _ in range(1 + random.randrange(3)):
                value = _changed(random, value, [read(other) for other in others[:1]])
            return write(value)
        except (ValueError, TypeError, RecursionError, msgspec.MsgspecError, OverflowError):
            pass
    return _bytes_changed(random, data, others)


def _json(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


_FORMS: dict[str, tuple[Callable[[bytes], Any], Callable[[Any], bytes]]] = {
    "msgpack": (msgspec.msgpack.decode, msgspec.msgpack.encode),
    "json": (json.loads, _json),
}


def _changed(random: Random, value: Any, others: Sequence[Any]) -> Any:
    """One place somewhere inside is another one."""
    if isinstance(value, dict) and value and random.randrange(6):
        key = random.choice(list(value))
        return {**value, key: _changed(random, value[key], others)}
    if isinstance(value, list) and value and random.randrange(6):
        at = random.randrange(len(value))
        return [*value[:at], _changed(random, value[at], others), *value[at + 1 :]]
    return _replaced(random, value, others)


def _replaced(random: Random, value: Any, others: Sequence[Any]) -> Any:
    if random.randrange(5) == 0:
        return _other(random, others)
    if isinstance(value, dict):
        return _dict_changed(random, value, others)
    if isinstance(value, list):
        return _list_changed(random, value, others)
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return random.choice(
            (*NUMBERS, value + 1, value - 1, -value, value * 2, value // 2 if isinstance(value, int) else 0, str(value))
        )
    if isinstance(value, str):
        return random.choice((*TEXTS, value + value, value[:-1], value.upper(), value + "\0", [value]))
    if isinstance(value, bytes):
        return _bytes_changed(random, value, ())
    return _other(random, others)


def _dict_changed(random: Random, value: dict[Any, Any], others: Sequence[Any]) -> Any:
    how = random.randrange(3)
    if how == 0 and value:
        gone = random.choice(list(value))
        return {key: each for key, each in value.items() if key != gone}
    if how == 1:
        keys = [key for other in others if isinstance(other, dict) for key in other] or ["x"]
        return {**value, random.choice([*keys, random.choice(TEXTS)]): _other(random, others)}
    return (
        list(value.values())
        if random.randrange(2)
        else {**value, **dict(zip(value, reversed(list(value.values())), strict=True))}
    )


def _list_changed(random: Random, value: list[Any], others: Sequence[Any]) -> Any:
    how = random.randrange(5)
    if how == 0 and value:
        at = random.randrange(len(value))
        return value[:at] + value[at + 1 :]
    if how == 1 and value:
        return [*value, random.choice(value)]
    if how == 2:
        return [*value, _other(random, others)]
    if how == 3 and len(value) < 100:
        return value * random.choice((2, 3, 50))
    return value[::-1]


def _other(random: Random, others: Sequence[Any]) -> Any:
    how = random.randrange(8)
    if how == 0:
        deep: Any = random.choice(NUMBERS)
        for _ in range(random.choice((1, 2, DEEP))):
            deep = [deep] if random.randrange(2) else {"a": deep}
        return deep
    if how == 1 and others:
        return random.choice(others)
    return random.choice((None, True, False, [], {}, "", random.choice(NUMBERS), random.choice(TEXTS)))


def _bytes_changed(random: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    changed = bytearray(data)
    for _ in range(1 + random.randrange(4)):
        how, at = random.randrange(6), random.randrange(len(changed) + 1)
        if how == 0:
            changed[at : at + 1 + random.randrange(8)] = b""
        elif how == 1:
            changed[at:at] = bytes(random.randrange(256) for _ in range(1 + random.randrange(8)))
        elif how == 2 and changed:
            changed[at % len(changed)] ^= 1 << random.randrange(8)
        elif how == 3 and changed:
            changed[at % len(changed)] = random.choice((0, 0x22, 0x7F, 0x80, 0x91, 0xC1, 0xD9, 0xDD, 0xFF))
        elif how == 4 and others:
            other = random.choice(list(others))
            changed[at:] = other[random.randrange(len(other) + 1) :]
        else:
            end = min(len(changed), at + 1 + random.randrange(32))
            changed[at:at] = changed[at:end] * random.choice((1, 2, 20, 2000 // max(1, end - at)))
    return bytes(changed[: 1 << 16])
