# SPDX-License-Identifier: Apache-2.0
"""Messages of ``kvxfer bench pair``: each request of the end that connects has one answer of the end that listens."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import msgspec

from kvxfer.errors import WireError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PAIRING = 1
"""Number of these messages, raised when one changes its meaning. Both ends need the same; their
endpoints agree on a version of the protocol by themselves."""


class _PairMessage(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    pass


class HostFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Facts about one end's machine, beside which the figures are read.

    Attributes:
        name: of the machine.
        copy_nbytes_per_s: rate of a plain copy in one thread.
        device: network device of the address at which it is met; empty if that is not known.
        device_nbytes_per_s: its rate, as the kernel tells it; 0 if it does not.
    """

    name: str
    copy_nbytes_per_s: float
    device: str = ""
    device_nbytes_per_s: float = 0.0


class Introduction(_PairMessage, frozen=True, kw_only=True):
    """Begin a run. ``dialed`` is the IP address by which the listening end was reached."""

    pairing: int
    version: str
    agent: str
    dialed: str


class Introduced(_PairMessage, frozen=True, kw_only=True):
    """Answer `Introduction`."""

    pairing: int
    version: str
    host: HostFacts


class Declined(_PairMessage, frozen=True, kw_only=True):
    """Answer anything that cannot be done; the run is over. ``code`` is one word that is stable between versions."""

    code: str
    reason: str


class TellTime(_PairMessage, frozen=True, kw_only=True):
    """Ask for the time of the listening end's clock."""


class TimeTold(_PairMessage, frozen=True, kw_only=True):
    """Answer `TellTime`: seconds since 1970."""

    seconds: float


class MakeSource(_PairMessage, frozen=True, kw_only=True):
    """Have a cache made, with an endpoint and a bare agent over it, in place of the one before."""

    block_nbytes: int
    blocks: int


class SourceMade(_PairMessage, frozen=True, kw_only=True):
    """Answer `MakeSource`.

    Attributes:
        port: of the endpoint's side channel.
        base: address of the first block.
        agent_info: description of the bare agent.
    """

    port: int
    base: int
    agent_info: bytes


class MeetAgent(_PairMessage, frozen=True, kw_only=True):
    """Have the bare agent meet this end's, whose first block is at ``base``."""

    agent_info: bytes
    base: int


class MakeLease(_PairMessage, frozen=True, kw_only=True):
    """Have blocks leased."""

    blocks: list[int]


class LeaseMade(_PairMessage, frozen=True, kw_only=True):
    """Answer `MakeLease`: the reference, as JSON."""

    ref: str


class WriteBare(_PairMessage, frozen=True, kw_only=True):
    """Have the bare agent write blocks into blocks of this end."""

    blocks: list[int]
    into: list[int]


class BareWritten(_PairMessage, frozen=True, kw_only=True):
    """Answer `WriteBare`."""

    seconds: float


class Finish(_PairMessage, frozen=True, kw_only=True):
    """End the run. ``cases`` were measured."""

    cases: int


class Agreed(_PairMessage, frozen=True, kw_only=True):
    """Answer what asks for nothing in return."""


PairRequest = Introduction | TellTime | MakeSource | MeetAgent | MakeLease | WriteBare | Finish
PairAnswer = Introduced | Declined | TimeTold | SourceMade | LeaseMade | BareWritten | Agreed

A = TypeVar("A", Introduced, TimeTold, SourceMade, LeaseMade, BareWritten, Agreed)

_encoder = msgspec.msgpack.Encoder()
_requests = msgspec.msgpack.Decoder(PairRequest)
_answers = msgspec.msgpack.Decoder(PairAnswer)


def encode(message: PairRequest | PairAnswer) -> bytes:
    """A message as it travels."""
    return _encoder.encode(message)


def request(frames: Sequence[bytes]) -> PairRequest:
    """The request in what has arrived. Raises WireError."""
    with _named():
        found: PairRequest = _requests.decode(b"".join(frames))
    return found


def answer(frames: Sequence[bytes]) -> PairAnswer:
    """The answer in what has arrived. Raises WireError."""
    with _named():
        found: PairAnswer = _answers.decode(b"".join(frames))
    return found


@contextmanager
def _named() -> Iterator[None]:
    try:
        yield
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise WireError(f"no message of kvxfer bench pair: {error}") from error
