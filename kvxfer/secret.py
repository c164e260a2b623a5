# SPDX-License-Identifier: Apache-2.0
"""What the endpoints of one fleet know and nobody else does: the keys of their control channel come from it."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import select
import time
from typing import TYPE_CHECKING, NamedTuple

import zmq
from zmq.utils import z85

from kvxfer.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

_log = logging.getLogger(__name__)

LEAST_NBYTES = 16
"""Shorter ones can be guessed."""

LEAST_DIFFERENT = 5
"""One of fewer different bytes can be guessed: of 16 random ones, in whatever notation, more than that differ."""

_MOST_NBYTES = 1 << 16
_FILE_S = 10.0
"""A file that is a pipe has to end within this."""

_VARIABLE, _FILE_VARIABLE = "KVXFER_SECRET", "KVXFER_SECRET_FILE"
_SALT = b"kvxfer secret, version 1"  # one for all: two servers that were told nothing but the secret have to agree
_COST = {"n": 1 << 15, "r": 8, "p": 1, "maxmem": 64 << 20}  # 32 MiB and about a tenth of a second


class KeyPair(NamedTuple):
    """Keys of CurveZMQ, in its text form."""

    public: bytes
    private: bytes

    def __repr__(self) -> str:
        return "KeyPair(...)"

    def __reduce__(self) -> str:
        raise TypeError("keys are not pickled: give each process its own secret")


class Secret:
    """Keys derived from a secret that people have put on each server: by scrypt (RFC 7914), and HKDF's second half (RFC 5869).

    Immutable, for any thread. Never shows what it holds. Making one takes a moment.

    Args:
        secret: bytes that nobody can guess, such as 32 from ``openssl rand -base64 32``.
        origin: where it comes from, for messages.

    Attributes:
        listener, caller: keys of whoever is connected to, and of whoever connects. All endpoints of a fleet have the same.

    Raises:
        ConfigError: it is too short.
    """

    __slots__ = ("_tokens", "caller", "listener")

    def __init__(self, secret: bytes, origin: str = "argument") -> None:
        if not isinstance(secret, bytes):
            raise ConfigError(f"a secret is bytes, the one from {origin} is a {type(secret).__name__}")
        if len(secret) < LEAST_NBYTES:
            raise ConfigError(f"a secret has at least {LEAST_NBYTES} bytes, the one from {origin} has {len(secret)}")
        if len(set(secret)) < LEAST_DIFFERENT:
            raise ConfigError(
                f"the secret from {origin} has {len(set(secret))} different bytes and can be guessed: take 32 random ones, "
                "as of openssl rand -base64 32"
            )
        root = hashlib.scrypt(secret, salt=_SALT, dklen=32, **_COST)
        self.listener: KeyPair = _pair(_expand(root, b"listener"))
        self.caller: KeyPair = _pair(_expand(root, b"caller"))
        self._tokens = _expand(root, b"tokens")

    def __repr__(self) -> str:
        return "Secret(...)"

    def __reduce__(self) -> str:
        raise TypeError("a secret is not pickled: give each process its own")

    @classmethod
    def resolve(cls, *, file: str | None = None, environ: Mapping[str, str] | None = None) -> Secret | None:
        """From a file, else ``KVXFER_SECRET_FILE``, else ``KVXFER_SECRET``; None if there is none.

        White space at the end does not count. A file may be a pipe, and has at most 64 KiB. The variable ``KVXFER_SECRET`` is
        inherited by every child of the process; a file is read once and is not.

        Raises:
            ConfigError: it cannot be read, or is too short. The message names where it comes from and never shows it.
        """
        environ = os.environ if environ is None else environ
        path = file or environ.get(_FILE_VARIABLE) or ""
        if path:
            try:
                content, mode = _read(path)
            except (OSError, ValueError) as error:
                raise ConfigError(f"cannot read the secret: {error}") from error
            if mode & 0o077:
                _log.warning("others on this machine may read the secret in %s: chmod 600", path)
            return cls(content.rstrip(), path)
        text = environ.get(_VARIABLE) or ""
        return cls(os.fsencode(text.rstrip()), _VARIABLE) if text else None

    def digest(self, known: bytes) -> bytes:
        """128 bits of something that can only be told from the outside by who has the secret."""
        return hmac.digest(self._tokens, known, "sha256")[:16]


def _read(path: str) -> tuple[bytes, int]:
    """Content and mode of a file, also of a pipe, which may have no writer, or one that never ends. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        mode, content, deadline = os.fstat(descriptor).st_mode, b"", time.monotonic() + _FILE_S
        while True:
            readable = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]
            if not readable:
                raise OSError(f"{path} has not ended after {_FILE_S:g} s")
            more = os.read(descriptor, _MOST_NBYTES)
            content += more
            if len(content) > _MOST_NBYTES:
                raise OSError(f"{path} holds more than {_MOST_NBYTES} bytes")
            if not more:
                return content, mode
    finally:
        os.close(descriptor)


def _expand(root: bytes, purpose: bytes) -> bytes:
    return hmac.digest(root, purpose + b"\x01", "sha256")


def _pair(private: bytes) -> KeyPair:
    text = z85.encode(private)
    return KeyPair(zmq.curve_public(text), text)
