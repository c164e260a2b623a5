# SPDX-License-Identifier: Apache-2.0
"""An endpoint without threads or transfer engine, whose events the test makes."""

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
    """Block ids by cache group, or only the ids if there is one group."""
    ids = [list(table.ids if isinstance(table, BlockTable) else table) for table in tables]
    return ids[0] if len(ids) == 1 else ids


class ScriptedTransfer:
    """A transfer with the attributes of `kvxfer.protocol.transfer.Transfer` that the connector uses."""

    def __init__(self, ref: LeaseRef, into: list[int], tokens: tuple[int, int | None]) -> None:
        self.ref, self.into, self.tokens = ref, into, tokens
        self.seconds, self.nbytes, self.descriptors = 0.25, 4096 * len(into), len(into)
        self.begins: list[int] = []


class ScriptedEndpoint:
    """An endpoint that records every call of the connector and reports the events of the test.

    Reads copy blocks between the caches of endpoints that have the same ``net``.
    """

    def __init__(self, net: dict[str, ScriptedEndpoint] | None = None) -> None:
        self.address = "tcp://127.0.0.1:5600"
        self.net = {} if net is None else net
        self.kv: list[torch.Tensor] = []
        self.calls: list[tuple[Any, ...]] = []
        self.published: dict[str, list[int]] = {}
        self.reading: dict[str, ScriptedTransfer] = {}
        self.metrics = Metrics()
        self.automatic = True
        self.raises: dict[str, Exception] = {}
        self.closed = 0
        self.waited: list[float] = []
        self.after: list[tuple[str, list[Completion]]] = []
        """Completions that each call of publish and read has to wait for."""
        self.events: list[Any] = []

    def _called(self, name: str, *args: Any) -> None:
        self.calls.append((name, *args))
        if name in self.raises:
            raise self.raises[name]

    def names(self) -> list[str]:
        """Names of the calls so far, in order."""
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
        self.published[token] = plain(blocks)
        self.net[token] = self

    def revoke(self, ref: LeaseRef) -> None:
        token = ref.token
        self._called("revoke", token)
        if self.published.pop(token, None) is not None:
            self.events.append(LeaseRevoked(token, ""))

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
        producer = self.net.get(ref.token)
        if producer is not None and ref.token not in self.reading:
            producer.end(ref.token, read=False)

    def poll(self, timeout_s: float = 0.0) -> list[Any]:
        self.waited.append(timeout_s)
        if "poll" in self.raises:
            raise self.raises["poll"]
        if self.automatic:
            for token in list(self.reading):
                self.finish(token)
        events, self.events = self.events, []
        return events

    def close(self) -> None:
        self.closed += 1

    # -- for tests

    def finish(self, token: str, error: KvxferError | None = None) -> None:
        """End a read."""
        transfer = self.reading.pop(token)
        producer = self.net.get(token)
        if error is not None:
            self.events.append(Failed(transfer, error))
            return
        assert producer is not None
        (first, stop), block_tokens = transfer.tokens, producer.kv[0].shape[2]
        assert stop is None and first % block_tokens == 0
        source = producer.published[token][first // block_tokens :]
        assert len(source) == len(transfer.into)
        for mine, theirs in zip(self.kv, producer.kv, strict=True):
            mine[transfer.into] = theirs[source]
        self.events.append(Done(transfer))
        producer.end(token, read=True)

    def end(self, token: str, *, read: bool, expired: bool = False) -> None:
        """End a lease of this producer."""
        if self.published.pop(token, None) is not None:
            self.events.append(LeaseExpired(token, "") if expired else LeaseReleased(token, "", read))
