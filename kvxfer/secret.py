# SPDX-License-Identifier: Apache-2.0
"""Shared secret of the endpoints of one fleet: the keys of their control channels are derived from it."""

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
"""Least length; a shorter secret can be guessed."""

LEAST_DIFFERENT = 5
"""Least number of different bytes; 16 random bytes, in any notation, have more."""

_MOST_NBYTES = 1 << 16
_FILE_S = 10.0
"""Time within which a file that is a pipe must end."""

_VARIABLE, _FILE_VARIABLE = "KVXFER_SECRET", "KVXFER_SECRET_FILE"
_SALT = b"kvxfer secret, version 1"  # constant, since two servers share nothing but the secret
_COST = {"n": 1 << 15, "r": 8, "p": 1, "maxmem": 64 << 20}  # 32 MiB and about a tenth of a second


class KeyPair(NamedTuple):
    """Pair of CurveZMQ keys, in text form."""

    public: bytes
    private: bytes

    def __repr__(self) -> str:
        return "KeyPair(...)"

    def __reduce__(self) -> str:
        raise TypeError("keys are not pickled: give each process its own secret")


class Secret:
    """Keys derived from the secret of a fleet, by scrypt (RFC 7914) and the expand step of HKDF (RFC 5869).

    Immutable, for any thread. Never shows the secret. The derivation takes about a tenth of a second.

    Args:
        secret: random bytes, such as those of ``openssl rand -base64 32``.
        origin: source of the secret, for messages.

    Attributes:
        listener: keys of the side that accepts a connection, the same for all endpoints of a fleet.
        caller: keys of the side that connects, the same for all endpoints of a fleet.

    Raises:
        ConfigError: the secret can be guessed.
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
        """Read the secret from a file, else ``KVXFER_SECRET_FILE``, else ``KVXFER_SECRET``; None if there is none.

        White space at the end is ignored. A file may be a pipe, and has at most 64 KiB. Child processes inherit the variable
        ``KVXFER_SECRET``, but not the content of a file.

        Raises:
            ConfigError: the secret cannot be read, or can be guessed. The message names its source and never shows it.
        """
        environ = os.environ if environ is None else environ
        path = file or environ.get(_FILE_VARIABLE) or ""
        if path:
            try:
                content, mode = _read(path)
            except (OSError, ValueError) as error:
                raise ConfigError(f"cannot read the secret: {error}") from error
            if mode & 0o077:
                _log.warning("other users of this machine may read the secret in %s: chmod 600", path)
            return cls(content.rstrip(), path)
        text = environ.get(_VARIABLE) or ""
        return cls(os.fsencode(text.rstrip()), _VARIABLE) if text else None

    def digest(self, known: bytes) -> bytes:
        """128-bit message authentication code of some bytes, keyed by the secret."""
        return hmac.digest(self._tokens, known, "sha256")[:16]


def _read(path: str) -> tuple[bytes, int]:
    """Read content and mode of a file or pipe within `_FILE_S`. Raises OSError."""
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
