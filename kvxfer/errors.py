# SPDX-License-Identifier: Apache-2.0
"""Every error kvxfer raises, in one tree.

::

    KvxferError
    +-- ConfigError              a setting is unknown or out of range (also a ValueError)
    +-- UnavailableError         an adapter cannot run here; the message says what to install
    +-- UnsupportedError         the adapter did not declare this capability
    +-- ClosedError              the object was closed
    +-- InternalError            a fault of kvxfer itself: worth a report, and to try again does not help
    |
    +-- LayoutError              a cache description contradicts itself (also a ValueError)
    +-- IncompatibleError        two cache descriptions cannot be served; ``axis`` says where they differ
    +-- BlockError               block ids are out of range, repeated or of unequal count (also a ValueError)
    +-- UnsupportedBufferError   memory that cannot be used as a cache buffer (also a TypeError)
    |
    +-- RegistrationError        the transfer engine refused a memory region
    +-- DescriptorError          a descriptor lies outside what both sides registered
    +-- PeerInfoError            a peer's description cannot be read by this adapter
    +-- PeerConflictError        another agent already goes by this name
    |   +-- OwnPeerError             the peer is this agent itself
    +-- PeerUnknownError         the peer was disconnected or never connected
    +-- TransferError            bytes did not arrive
    |   +-- PeerLostError            the peer died or its connection broke
    |   +-- TransferTimeoutError     the deadline passed
    |   +-- TransferFailedError      the transfer engine reported a failure
    |   +-- IntegrityError           the bytes that arrived differ from the source
    |
    +-- WireError                a message cannot be decoded, is too large, or has another protocol version
    +-- HandshakeError           the peer refused the handshake, or is not the one expected; ``code`` is its reason
    +-- PeerTimeoutError         the peer's control channel did not answer in time
    +-- LeaseError
        +-- LeaseRefError            the lease that came with a request is malformed (also a ValueError)
        +-- LeaseUnknownError        the producer knows no such lease
        +-- LeaseEndedError          the lease expired or was revoked: bytes read under it are discarded

Two attributes matter to callers: ``retryable`` (may the same call succeed later?) and ``quiet`` (is it certain that nothing
will still be written to the local blocks?). Blocks of an error that is not quiet must stay unused until the agent is closed;
the endpoint does that itself before it reports a failed transfer.
"""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING, ClassVar, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence


class KvxferError(Exception):
    """Base of all errors.

    Attributes:
        retryable: the same call may succeed later, without a change by the caller.
        quiet: nothing will be written to the caller's memory after this error.
    """

    retryable: ClassVar[bool] = False
    quiet: ClassVar[bool] = True


class ConfigError(KvxferError, ValueError):
    """A setting is unknown or out of range.

    Cure: The message names the setting, its value, where that came from, and what is allowed: correct it and start
    again.
    """


class UnavailableError(KvxferError):
    """An adapter cannot run here; the message says what to install.

    Cure: Do what the message says; ``kvxfer agents`` and ``kvxfer doctor`` list what can be used here, and why the
    rest cannot.
    """


class UnsupportedError(KvxferError):
    """The adapter did not declare the capability that the call needs.

    Cure: Use an adapter that declares it (``kvxfer agents``), or leave the call out; a refused ``convert`` names
    the dtypes.
    """


class ClosedError(KvxferError):
    """The object was closed before or during the call.

    Cure: Expected while a server ends. Else find what closed the endpoint: the log has its reason.
    """


class InternalError(KvxferError):
    """A fault of kvxfer itself, named in the message and counted in ``kvxfer_internal_errors_total``. Please report it.

    Cure: Report it with the trace in the log. The transfer concerned has ended; to try again does not help.
    """


class LayoutError(KvxferError, ValueError):
    """A cache description contradicts itself.

    Cure: Correct the description, as the message says: names, shapes and strides of the layers.
    """


class IncompatibleError(KvxferError):
    """Two caches cannot serve each other.

    Cure: Compare the two servers on the axis that the message names, with both values. ``convert`` serves other
    dtypes and scales; ``model_fingerprint`` joins servers whose models are equal and look different; ``kvxfer plan``
    compares caches beforehand.

    Attributes:
        axis: the axis or property on which they differ, e.g. ``"dtype"`` or ``"heads"``.
    """

    def __init__(self, axis: str, message: str) -> None:
        super().__init__(message)
        self.axis = axis


class BlockError(KvxferError, ValueError):
    """Block ids are out of range, repeated in a target, or of unequal count.

    Cure: A fault of the calling engine: give each block once, as many as the tokens fill, and none that another
    read still has.
    """


class UnsupportedBufferError(KvxferError, TypeError):
    """Memory that cannot be used as a cache buffer, with the reason in one sentence.

    Cure: Use a device and an array that the message names; ``kvxfer agents`` lists the devices that can be used.
    """


class RegistrationError(KvxferError):
    """The transfer engine refused a memory region.

    Cure: Raise ``ulimit -l`` where an RDMA device pins memory, or leave the cache in memory that the transfer
    engine takes.
    """


class DescriptorError(KvxferError, ValueError):
    """A descriptor is malformed or lies outside what both sides registered.

    Cure: A fault of the adapter or of a peer: report it with the message.
    """


class PeerInfoError(KvxferError, ValueError):
    """A peer's description is malformed or was made by another adapter.

    Cure: Run the same version of kvxfer, and the same transfer engine, on both servers.
    """


class PeerConflictError(KvxferError):
    """Another agent already goes by this name.

    Cure: Give each engine a name of its own (vLLM: ``engine_id``). After a restart the old one is forgotten, and
    the next try goes through.
    """

    retryable = True


class OwnPeerError(PeerConflictError):
    """The peer is this agent itself: an endpoint was asked to read a lease of its own.

    Cure: Correct the router: it sends the decode request to the server that prefilled it.
    """

    retryable = False


class PeerUnknownError(KvxferError):
    """The peer was disconnected or never connected.

    Cure: Try again: the peer is met again at the next read.
    """

    retryable = True


class TransferError(KvxferError):
    """Bytes did not arrive.

    Cure: Try again, or let the engine compute the prompt (vLLM: ``kv_load_failure_policy``).
    """

    retryable = True


class PeerLostError(TransferError):
    """The peer died or its connection broke.

    Cure: Look at the peer's log: it ended, or the network between the two broke. Try again when it is back.
    """

    # A broken connection is no proof that the engine dropped every write it had accepted.
    quiet = False


class TransferTimeoutError(TransferError):
    """The deadline passed. No known transfer engine stops writing then: late bytes may still arrive.

    Cure: Measure the pair with ``kvxfer doctor --peer``; look for a frozen peer or a lost network; raise
    ``read_timeout_s`` for long reads on slow links.
    """

    quiet = False


class TransferFailedError(TransferError):
    """The transfer engine reported a failure.

    Cure: Read the transfer engine's own log, which has the reason; ``kvxfer doctor --peer`` tries the link by
    itself.
    """

    quiet = False


class Difference(NamedTuple):
    """A stretch of tokens whose bytes differ between consumer and producer.

    Attributes:
        group: cache group of the consumer.
        layer: number of the layer.
        layer_name: name of the layer, empty where layers have none.
        record: ``"kv"`` or another record of `kvxfer.layout.spec`.
        tokens: first token of the request, and first after the last.
        blocks: ids of the consumer's blocks that hold them.
    """

    group: str
    layer: int
    layer_name: str
    record: str
    tokens: tuple[int, int]
    blocks: tuple[int, ...]

    def __str__(self) -> str:
        layer = f"layer {self.layer}" + (f" ({self.layer_name})" if self.layer_name else "")
        blocks = ", ".join(map(str, self.blocks))
        return f"{self.record} of {layer}, tokens {self.tokens[0]} to {self.tokens[1] - 1} in block {blocks}"


class IntegrityError(TransferError):
    """The bytes that arrived differ from those of the producer. Only reads with ``verify`` find this.

    Cure: The message names layers and blocks. Look for faulty memory or network hardware, and for an engine that
    changes leased blocks.

    Attributes:
        differences: the differences that were found.
        more: there may be more: the search ended at a limit.
    """

    def __init__(self, differences: Sequence[Difference], *, more: bool = False) -> None:
        shown = "; ".join(map(str, differences[:3]))
        rest = len(differences) - 3
        tail = f"; and {'at least ' if more else ''}{rest} more" if rest > 0 else ""
        super().__init__(f"the bytes that arrived differ from the source: {shown}{tail}")
        self.differences: tuple[Difference, ...] = tuple(differences)
        self.more = more


class WireError(KvxferError, ValueError):
    """A message cannot be decoded, is too large, or has another protocol version.

    Cure: Run the same version of kvxfer on both sides, and let nothing else use the side channel's port.
    """


class HandshakeError(KvxferError):
    """The peer refused the handshake, or is not the one that was expected.

    Cure: ``code`` is the reason: ``incompatible``, another cache; ``protocol``, another version of kvxfer;
    ``agent``, another transfer engine; ``identity`` and ``rank``, another process at that address than the lease
    says.

    Attributes:
        code: the reason as a short word that is stable between versions, e.g. ``"incompatible"``.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class PeerTimeoutError(KvxferError):
    """The peer's control channel did not answer in time.

    Cure: Reach the peer's side channel from here (``kvxfer doctor --peer HOST:PORT``): host, port, firewall, and
    the same secret on both.
    """

    retryable = True


class LeaseError(KvxferError):
    """A lease cannot be used.

    Cure: See the errors below it.
    """


class LeaseRefError(LeaseError, ValueError):
    """The lease that came with a request is malformed.

    Cure: Correct the proxy, which changed or invented the parameters; clients must not send any.
    """


class LeaseUnknownError(LeaseError):
    """The producer knows no such lease.

    Cure: The producer was restarted, or the lease ended long ago, or another prompt was sent to it: send the
    request again.
    """


class LeaseEndedError(LeaseError):
    """The lease expired or was revoked; bytes read under it are discarded.

    Cure: Raise ``lease_s`` (vLLM: ``lease_seconds``) if requests wait longer than that before the consumer sees
    them; a producer that aborts or preempts the request revokes its lease, too.
    """


def names_of_errors(base: type[KvxferError] = KvxferError) -> tuple[str, ...]:
    """Names of all errors of the tree, in its order."""
    return tuple(name for kind in base.__subclasses__() for name in (kind.__name__, *names_of_errors(kind)))


def fresh(error: KvxferError) -> KvxferError:
    """Copy an error without its traceback, which would grow each time the error is raised."""
    new = type(error).__new__(type(error))
    new.args = error.args
    new.__dict__.update(error.__dict__)
    new.__cause__, new.__suppress_context__ = error.__cause__, error.__suppress_context__
    return new


def release_frames(error: BaseException) -> None:
    """Drop the references that an error's tracebacks hold to local variables, since an engine may keep the error.

    The tracebacks of its causes still name files and lines.
    """
    error.__traceback__ = None
    seen = {id(error)}
    rest = [error.__cause__, error.__context__]
    while rest:
        cause = rest.pop()
        if cause is not None and id(cause) not in seen:
            seen.add(id(cause))
            traceback.clear_frames(cause.__traceback__)
            rest += [cause.__cause__, cause.__context__]


def printable(text: str) -> str:
    """Text of a peer for messages and logs: without characters that move a cursor or begin a line."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def shown(token: str) -> str:
    """Beginning of a lease's token for messages and logs: enough to tell leases apart, too little to acquire one."""
    return f"{token[:8]}..."
