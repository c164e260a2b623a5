# SPDX-License-Identifier: Apache-2.0
"""An endpoint without threads or transfer engine: what happens, and when, is the test's to say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvxfer.layout.block_table import BlockTable
from kvxfer.metrics import Metrics
from kvxfer.protocol.transfer import Done, Failed, LeaseExpired, LeaseReleased, LeaseRevoked

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from kvxfer.buffers.base import Completion
    from kvxfer.errors import KvxferError
    from kvxfer.protocol.lease_ref import LeaseRef


def plain(tables: Sequence[Any]) -> Any:
    """Block ids by cache group; of one group alone, bare."""
    ids = [list(table.ids if isinstance(table, BlockTable) else table) for table in tables]
    return ids[0] if len(ids) == 1 else ids


class ScriptedTransfer:
    """Stands in for `kvxfer.protocol.transfer.Transfer`."""

    def __init__(self, ref: LeaseRef, into: list[int], tokens: tuple[int, int | None]) -> None:
        self.ref, self.into, self.tokens = ref, into, tokens
        self.seconds, self.nbytes, self.descriptors = 0.25, 4096 * len(into), len(into)


class ScriptedEndpoint:
    """Stands in for `kvxfer.Endpoint`: records every call, and events happen when the test says so.

    Give two of them the same ``net`` and reads copy blocks from one engine's cache to the other's.
    """

    def __init__(self, net: dict[str, ScriptedEndpoint] | None = None) -> None:
        self.net = {} if net is None else net
        self.kv: list[torch.Tensor] = []
        self.calls: list[tuple[Any, ...]] = []
        self.offered: dict[str, list[int]] = {}
        self.reading: dict[str, ScriptedTransfer] = {}
        self.metrics = Metrics()
        self.automatic = True
        self.raises: dict[str, Exception] = {}
        self.closed = 0
        self.waited: list[float] = []
        self.after: list[tuple[str, list[Completion]]] = []
        """Behind what each of seal, offer and read was to happen."""
        self._events: list[Any] = []

    def _called(self, name: str, *args: Any) -> None:
        self.calls.append((name, *args))
        if name in self.raises:
            raise self.raises[name]

    def names(self) -> list[str]:
        """Names of the calls so far."""
        return [call[0] for call in self.calls]

    def announce(self, ref: LeaseRef) -> None:
        self._called("announce", ref.token)

    def join(self, addresses: Sequence[str]) -> None:
        self._called("join", addresses)

    def publish(
        self, ref: LeaseRef, blocks: Sequence[Any], *, complete: bool = True, after: Sequence[Completion] = ()
    ) -> None:
        token, name = ref.token, "publish" if complete else "publish part"
        self.after.append((name, list(after)))
        self._called(name, token, plain(blocks))
        if not complete:
            return
        self.offered[token] = plain(blocks)
        self.net[token] = self

    def revoke(self, ref: LeaseRef) -> None:
        token = ref.token
        self._called("revoke", token)
        if self.offered.pop(token, None) is not None:
            self._events.append(LeaseRevoked(token, ""))

    def acquire(self, ref: LeaseRef) -> None:
        self._called("acquire", ref.token)

    def read(
        self, ref: LeaseRef, into: Sequence[Any], *, tokens: tuple[int, int | None], after: Sequence[Completion] = ()
    ) -> ScriptedTransfer:
        self.after.append(("read", list(after)))
        self._called("read", ref.token, plain(into), tokens)
        transfer = self.reading[ref.token] = ScriptedTransfer(ref, plain(into), tokens)
        return transfer

    def release(self, ref: LeaseRef) -> None:
        self._called("release", ref.token)
        owner = self.net.get(ref.token)
        if owner is not None and ref.token not in self.reading:
            owner.end(ref.token, read=False)

    def poll(self, timeout_s: float = 0.0) -> list[Any]:
        self.waited.append(timeout_s)
        if "poll" in self.raises:
            raise self.raises["poll"]
        if self.automatic:
            for token in list(self.reading):
                self.finish(token)
        events, self._events = self._events, []
        return events

    def close(self) -> None:
        self.closed += 1

    # -- what the test makes happen

    def finish(self, token: str, error: KvxferError | None = None) -> None:
        """A read ends."""
        transfer = self.reading.pop(token)
        owner = self.net.get(token)
        if error is not None:
            self._events.append(Failed(transfer, error))
            return
        assert owner is not None
        (first, stop), block_tokens = transfer.tokens, owner.kv[0].shape[2]
        assert stop is None and first % block_tokens == 0
        source = owner.offered[token][first // block_tokens :]
        assert len(source) == len(transfer.into)
        for mine, theirs in zip(self.kv, owner.kv, strict=True):
            mine[transfer.into] = theirs[source]
        self._events.append(Done(transfer))
        owner.end(token, read=True)

    def end(self, token: str, *, read: bool, expired: bool = False) -> None:
        """A lease of this producer ends."""
        if self.offered.pop(token, None) is not None:
            self._events.append(LeaseExpired(token, "") if expired else LeaseReleased(token, "", read))
