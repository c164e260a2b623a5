# SPDX-License-Identifier: Apache-2.0
"""Translation of NIXL's exceptions to kvxfer's; the original stays chained as the cause.

NIXL (1.5.1) has twelve exception classes without a common base, and each of its module names has its own set of them, so
they are told apart by class name. The meaning depends on the call that raised: "not found" is a missing library when a
backend starts, and memory outside every region when a transfer is made.
"""

from __future__ import annotations

from typing import ClassVar

from kvxfer.errors import (
    ConfigError,
    KvxferError,
    PeerConflictError,
    PeerInfoError,
    PeerLostError,
    RegistrationError,
    TransferFailedError,
    UnavailableError,
    UnsupportedError,
)


class NotStartedError(TransferFailedError):
    """NIXL refused to prepare the transfer: no byte was moved."""

    quiet: ClassVar[bool] = True


def backend_error(error: Exception, backend: str) -> KvxferError:
    """The error for an exception of `createBackend`."""
    match type(error).__name__:
        case "nixlNotFoundError":
            why = "its plug-in cannot be loaded: it was not built into this NIXL, or a library it needs is missing"
        case "nixlInvalidParamError":
            return ConfigError(f"NIXL refuses the options of backend {backend}: {error}")
        case "nixlBackendError":
            why = "it found no device or transport that it can use, or its options do not fit"
        case _:
            why = f"{type(error).__name__}: {error}"
    return UnavailableError(f"NIXL backend {backend} does not start here: {why} (NIXL_LOG_LEVEL=DEBUG tells more)")


def registration_error(error: Exception, what: str) -> RegistrationError:
    """The error for an exception of `registerMem` or `deregisterMem`."""
    return RegistrationError(f"NIXL refuses to {what}: {_native(error)}")


def peer_error(error: Exception, name: str) -> KvxferError:
    """The error for an exception of `loadRemoteMD`."""
    match type(error).__name__:
        case "nixlNotAllowedError":
            return PeerConflictError(
                f"NIXL knows another agent {name!r}, at another address: disconnect that one first"
            )
        case "nixlInvalidParamError":
            return PeerConflictError(f"{name!r} is this agent's own name")
        case "nixlMismatchError":
            return PeerInfoError(f"NIXL cannot read the metadata of {name!r}: {_native(error)}")
        case "nixlNotFoundError" | "nixlBackendError" | "nixlNotSupportedError":
            return PeerInfoError(f"no NIXL backend is common to this agent and {name!r}: {_native(error)}")
        case _:
            return PeerInfoError(f"NIXL refuses the metadata of {name!r}: {_native(error)}")


def preparation_error(error: Exception, name: str) -> KvxferError:
    """The error for an exception of `createXferReq`: nothing was posted yet."""
    match type(error).__name__:
        case "nixlRemoteDisconnectError":
            return PeerLostError(f"the connection to {name!r} is broken")
        case "nixlNotFoundError":
            return NotStartedError(f"NIXL finds no backend that reaches these regions of {name!r}: {_native(error)}")
        case "nixlNotSupportedError":
            return UnsupportedError(f"no NIXL backend moves this kind of memory to {name!r}")
        case _:
            return NotStartedError(f"NIXL refuses the transfer with {name!r}: {_native(error)}")


def transfer_error(error: Exception, name: str) -> KvxferError:
    """The error for an exception of `postXferReq` or `getXferStatus`: some bytes may have moved, others may still move."""
    if type(error).__name__ in {"nixlRemoteDisconnectError", "nixlCancelledError"}:
        return PeerLostError(f"{name!r} died, or the connection to it broke, during the transfer")
    return TransferFailedError(f"the transfer with {name!r} failed: {_native(error)}")


def _native(error: Exception) -> str:
    return f"{type(error).__name__} {error}".strip()
