# SPDX-License-Identifier: Apache-2.0
"""`Endpoint`: what an engine holds. One per rank; producer and consumer at once."""

from __future__ import annotations

import logging
import os
import queue
import secrets
import socket
import threading
import weakref
from operator import index
from typing import TYPE_CHECKING, Any

import msgspec

from kvxfer import registry
from kvxfer.blocks import MAX_TOKENS, ids_to_wire, tables
from kvxfer.buffer import Completion
from kvxfer.config import MAX_S, Settings
from kvxfer.consumer import Consumer
from kvxfer.datapath import DataPath
from kvxfer.driver import Driver
from kvxfer.errors import BlockError, ClosedError, ConfigError, LeaseError, LeaseRefError, shown
from kvxfer.fence import LeaseBoard
from kvxfer.host import REAL
from kvxfer.lease import LeaseRef
from kvxfer.leases import LeaseTable
from kvxfer.metrics import Metrics
from kvxfer.peer import Identity
from kvxfer.plan import CASTABLE, plan
from kvxfer.producer import Producer
from kvxfer.route import Costs, Route, Router
from kvxfer.secret import Secret
from kvxfer.transfer import Done, Event, Failed, LeaseRevoked, Transfer
from kvxfer.wire import MAX_NAME, Address

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

    from kvxfer.cache import KVCache
    from kvxfer.host import Host, Running
    from kvxfer.peer import Peer

_log = logging.getLogger(__name__)


class Endpoint:
    """Moves the KV of requests between this process's cache and those of others.

    All methods may be called from any thread, never block on the network, and raise only for what the caller itself
    did wrong; whatever a peer does ends as an event, a failed `Transfer` or a counted refusal.

    Args:
        cache: this rank's KV cache. Its memory must stay where it is until `close`.
        agent: what moves the bytes: a name of the registry, or a callable that makes an agent from its name. A callable that has an
            argument ``loopback_only`` is told by it whether ``bind`` is reached from this machine only (see `TransferAgent`).
        bind: control address to listen on, ``tcp://host:port``; port 0 takes a free one (see `address`).
        name: of this engine, unique among its peers and new at each start; random by default.
        agent_options: for the adapter, see its documentation. Only with a registry name.
        advertise: host by which peers reach ``bind``, if that is not what was bound.
        settings: times and limits; by default from the environment, see `Settings.resolve`.
        convert: elements of other dtypes may be converted on the way into this cache; else such a producer is refused.
        costs: by which routes are chosen; by default as ``kvxfer bench calibrate`` measured them, see `Costs.load`.
        route: take this route and no other, for measuring and for tests.
        verify: of each read compare what arrived with what its source has (docs/integrity.md). Takes about as long as to hash it.
        secret: of all endpoints that may talk to each other, whose control channel it then authenticates and encrypts; by default
            from the environment, see `Secret.resolve`.
        allow_unauthenticated: without a secret, ``bind`` may be an address that other machines reach. By default if
            ``KVXFER_ALLOW_UNAUTHENTICATED`` is 1.
        host: clock, channel and threads; another one for simulators only.

    Raises:
        ConfigError: an option is wrong, or the address cannot be bound, or not without a secret.
        UnavailableError: the adapter cannot run here.
        RegistrationError: the transfer engine refuses the cache's memory.
    """

    def __init__(
        self,
        cache: KVCache,
        agent: registry.AgentChoice = "nixl",
        *,
        bind: str = "tcp://127.0.0.1:0",
        name: str | None = None,
        agent_options: Mapping[str, Any] | None = None,
        advertise: str | None = None,
        settings: Settings | None = None,
        convert: bool = False,
        costs: Costs | None = None,
        route: Route | str | None = None,
        verify: bool = False,
        secret: Secret | None = None,
        allow_unauthenticated: bool | None = None,
        host: Host = REAL,
    ) -> None:
        self._now = host.now
        self.settings: Settings = settings if settings is not None else Settings.resolve()
        self.metrics: Metrics = Metrics()
        self.epoch: str = secrets.token_hex(8)
        self.name: str = name if name is not None else f"{socket.gethostname()}-{secrets.token_hex(6)}"
        if not 0 < len(self.name) <= MAX_NAME:
            raise ConfigError(f"name must have 1 to {MAX_NAME} characters, not {len(self.name)}")
        self.cache: KVCache = cache
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._close_lock = threading.Lock()
        self._closed = False
        self._convert = convert
        self._costs = costs if costs is not None else Costs.load()
        self._route = None if route is None else _route(route)
        self._verify = verify
        board = LeaseBoard(self.settings.max_leases)
        if allow_unauthenticated is None:
            allow_unauthenticated = os.environ.get("KVXFER_ALLOW_UNAUTHENTICATED") == "1"
        channel = host.channel(
            bind,
            settings=self.settings,
            metrics=self.metrics,
            advertise=advertise,
            secret=secret if secret is not None else Secret.resolve(),
            allow_unauthenticated=allow_unauthenticated,
        )
        self._driver = driver = Driver(channel, self.metrics, self._events.put, host.now)
        try:
            maker = registry.agent_maker(
                agent,
                dict(agent_options or {}),
                f"{self.name}/{cache.spec.rank}/{self.epoch}",
                loopback=channel.loopback,
            )
            self._data = DataPath(maker, cache, board, self.settings, self.metrics, driver.reports, host)
            adapter, agent_info = self._data.start()
        except BaseException:
            channel.close()
            raise
        addressable = all(buffer.memory is not None for buffer in cache.buffers)
        slot_nbytes = self._data.arena.slot_nbytes
        self._identity = Identity(
            self.name, self.epoch, adapter, agent_info, cache.spec, addressable, slot_nbytes, _casts(cache)
        )
        table = LeaseTable(self.settings, board)
        self._producer = Producer(self._identity, table, self.settings, self.metrics, driver.actions)
        self._consumer = Consumer(self._identity, self.settings, self.metrics, driver.actions, self._routes)
        self.address: str = channel.address
        """Where peers find this endpoint, for `LeaseRef.addresses`."""
        driver.drive(self._producer, self._consumer, self._data)
        self._running = host.run("kvxfer-control", driver)
        # Daemon threads inside vendor code at interpreter exit crash; an engine that forgets close() is forgiven.
        self._finalizer = weakref.finalize(self, _forgotten, driver, self._running)
        _log.info("kvxfer endpoint %s at %s by %s: %s", self.name, self.address, adapter, self.settings.describe())

    # -- producer ---------------------------------------------------------------------------------------------------

    def announce(
        self, ref: LeaseRef | None = None, *, request: str = "", num_tokens: int = 0, digest: str = ""
    ) -> LeaseRef:
        """Make a lease known before its blocks are complete, so that a consumer that is early waits instead of failing.

        Args:
            ref: minted elsewhere (`LeaseRef.mint`); by default one is minted here from the other arguments.

        Returns:
            the reference that travels with the request.

        Raises:
            ConfigError: without ``ref`` on an engine of several ranks: one rank does not know the addresses of the others.
            LeaseRefError: ``ref`` is none, or a field is out of range.
        """
        if ref is not None:
            ref = _checked(ref)
        elif self.cache.spec.world > 1:
            raise ConfigError(
                f"an engine of {self.cache.spec.world} ranks mints one lease for all of them: LeaseRef.mint with the address "
                "of each, and every rank announces it"
            )
        else:
            ref = LeaseRef.mint(
                owner=self.name, addresses=[self.address], request=request, num_tokens=num_tokens, digest=digest
            )
        token, request = ref.token, ref.request
        self._driver.command(lambda now: self._producer.announce(token, request, now))
        return ref

    def offer(self, ref: LeaseRef, blocks: Any, *, after: Sequence[Completion] = ()) -> None:
        """The announced lease's blocks are complete. They must not change until the lease's end event.

        Exactly one of LeaseSettled, LeaseExpired, LeaseRevoked follows, ``lease_s`` from now at the latest unless a
        consumer renews. Blocks that do not begin with those that were sealed before revoke the lease.

        Args:
            blocks: block ids per cache group in token order, or a `BlockTable` where they do not begin with the first
                token; the plain sequence or table for a cache of one group.
            after: what devices are still doing to these blocks (`Completion`, such as an event that was recorded behind
                the kernels): nobody may read them before it has ended, and if it fails the lease is revoked. Asked by
                kvxfer's own thread, every millisecond at first. By default the blocks are complete now.

        Raises:
            BlockError: not blocks of this cache.
            ConfigError: something in ``after`` is no `Completion`.
            LeaseRefError: ``ref`` is none.
            LeaseError: it was offered before, and no event has told yet how that ended. Nothing changes.
        """
        raw, firsts = self._on_the_wire(blocks)
        token, request, ends = _checked(ref).token, ref.request, _completions(after)
        if not self._producer.may_offer(token):
            raise LeaseError(
                f"lease {shown(token)} was offered before: wait for its end event before offering it again"
            )
        if not self._driver.command(lambda now: self._producer.offer(token, raw, now, firsts, ends)):
            self._events.put(LeaseRevoked(token, request))  # closed: nobody will read them

    def join(self, addresses: Sequence[str]) -> None:
        """Say where all ranks of this engine listen, for consumers whose lease names the first one only.

        To be called once, before anybody is told of this engine.

        Args:
            addresses: control addresses in rank order.

        Raises:
            ConfigError: they are not one for each rank.
        """
        try:
            checked = msgspec.convert(list(addresses), list[Address])
        except (msgspec.ValidationError, TypeError) as error:
            raise ConfigError(f"addresses of ranks: {error}") from error
        if len(checked) != self.cache.spec.world:
            raise ConfigError(f"{len(checked)} addresses for {self.cache.spec.world} ranks")
        self._driver.command(lambda _: self._producer.joined(checked))

    def seal(self, ref: LeaseRef, blocks: Any, *, after: Sequence[Completion] = ()) -> None:
        """So many blocks of an announced lease are complete while prefill goes on: a consumer that waits begins to read them.

        They must not change until the lease's end event, as if they were offered. To be called as often as there are more, and
        then `offer`; an end before that is not told, for the blocks are in use anyway. What is partly filled is not sealed, and
        neither are sliding windows and states, whose blocks change until the end: give no blocks of such groups.

        Args:
            blocks: as of `offer`: all that are complete by now, with those that were sealed before. Tables that do not begin
                with those revoke the lease: LeaseRevoked follows its `offer`.
            after: as of `offer`; what is sealed later, and the offer, count after it too.

        Raises:
            BlockError: not blocks of this cache.
            ConfigError: something in ``after`` is no `Completion`.
            LeaseRefError: ``ref`` is none.
        """
        raw, firsts = self._on_the_wire(blocks)
        token, ends = _checked(ref).token, _completions(after)
        self._driver.command(lambda now: self._producer.seal(token, raw, now, firsts, ends))

    def lease(self, blocks: Any, *, request: str = "", num_tokens: int = 0, digest: str = "") -> LeaseRef:
        """`announce` and `offer` in one: blocks that are complete already."""
        tables(self.cache.spec, blocks)  # a bad call announces nothing
        ref = self.announce(request=request, num_tokens=num_tokens, digest=digest)
        self.offer(ref, blocks)
        return ref

    def revoke(self, ref: LeaseRef, reason: str = "revoked by the producer") -> None:
        """End a lease early. LeaseRevoked follows if its blocks had been offered and it had not ended before.

        Raises:
            LeaseRefError: ``ref`` is none.
        """
        token = _checked(ref).token
        self._driver.command(lambda _: self._producer.revoke(token, reason[:1024]))

    # -- consumer ---------------------------------------------------------------------------------------------------

    def hold(self, ref: LeaseRef) -> None:
        """Open a lease ahead of its `read` and keep it alive, for ``hold_s`` at the longest, until read or dropped.

        Raises:
            LeaseRefError: ``ref`` is none.
        """
        ref = _checked(ref)
        self._driver.command(lambda now: self._consumer.hold(ref, now))

    def read(
        self,
        ref: LeaseRef,
        into: Any,
        *,
        tokens: tuple[int, int | None] | None = None,
        timeout_s: float | None = None,
        verify: bool | None = None,
        after: Sequence[Completion] = (),
    ) -> Transfer:
        """Read a lease's KV into this cache, whatever the producer's looks like; returns at once. A lease is read once.

        Args:
            into: target block ids per cache group in token order; the plain sequence for a cache of one group. They begin
                with the block in which the first token to be read lies; a `BlockTable` says so for itself.
            tokens: read only the request's tokens ``[start, stop)``, whose first ones this cache has already, say; stop
                None means to the end. By default all that ``into`` holds and the lease has.
            timeout_s: the transfer ends by then, well or not. By default in ``read_timeout_s``, and ``match_s`` and
                ``announce_s`` later if ``ref`` was `LeaseRef.shared`, so that prefill has its time.
            verify: compare what arrived with what its source has; by default as the endpoint was told. What differs fails the
                transfer by `IntegrityError`, which says where.
            after: nothing is written to ``into`` before all of these have ended: what this side's devices still do with those
                blocks, for whoever had them before (`DeviceBuffer.mark`). One that fails, fails the transfer.

        Returns:
            a transfer that ends in Done or Failed. Until then the target blocks belong to kvxfer.

        Raises:
            BlockError: not blocks of this cache, or one twice; or ``tokens`` is no interval.
            ConfigError: ``timeout_s`` is no number of seconds, or ``after`` holds something that cannot be waited for.
            LeaseRefError: ``ref`` is none.
        """
        if not self._consumer.knows(ref):
            ref = _checked(ref)
        after = _completions(after)
        if tokens is not None:
            tokens = _interval(tokens)
        targets = tables(self.cache.spec, into, "target", first_token=tokens[0] if tokens else 0, distinct=True)
        wait_s = timeout_s
        if wait_s is None:
            wait_s = self.settings.read_timeout_s
            if ref.early:
                wait_s = min(wait_s + self.settings.match_s + self.settings.announce_s, MAX_S)
        if not isinstance(wait_s, (int, float)) or not 0 <= wait_s <= MAX_S:
            raise ConfigError(f"timeout_s must be a number of seconds, not {timeout_s!r}")
        deadline = self._now() + wait_s
        transfer = Transfer(
            ref,
            targets,
            tokens,
            deadline,
            self._ended,
            self._now,
            verify=self._verify if verify is None else verify,
            after=after,
        )
        # A lease that was granted ahead needs the control thread for nothing: it is told of the read, but not woken.
        job = self._consumer.take(transfer)
        if job is None:
            accepted = self._driver.command(lambda now: self._consumer.read(transfer, now))
        else:
            accepted = self._driver.command(lambda _: self._consumer.reading(transfer), wake=False)
        if not accepted:
            transfer.end(ClosedError("the endpoint was closed"))
        elif job is not None:
            self._data.do(job)
        return transfer

    def granted(self, ref: LeaseRef) -> bool:
        """A lease that is held could be read at once: its blocks are complete, and every rank of its producer was met.

        Raises:
            LeaseRefError: ``ref`` is none.
        """
        return self._consumer.granted(_checked(ref).token)

    def drop(self, ref: LeaseRef) -> None:
        """The blocks are not needed: the producer gets them back at once. No effect on a lease being read.

        Raises:
            LeaseRefError: ``ref`` is none.
        """
        ref = _checked(ref)
        self._driver.command(lambda now: self._consumer.drop(ref, now))

    @property
    def slot_nbytes(self) -> int:
        """Largest chunk that is staged on the packed route."""
        return self._data.arena.slot_nbytes

    # -- both -------------------------------------------------------------------------------------------------------

    def poll(self, timeout_s: float = 0.0) -> list[Event]:
        """What happened since the last call; waits up to ``timeout_s`` for the first event. Each comes once."""
        events: list[Event] = []
        try:
            if timeout_s > 0:
                events.append(self._events.get(timeout=timeout_s))
            while True:
                events.append(self._events.get_nowait())
        except queue.Empty:
            return events

    def in_use(self) -> dict[str, int]:
        """How much of what is in use at this moment; all 0 when nothing is under way. Any thread.

        Returns:
            numbers of ``leases`` of this engine, ``chunks`` packed for others (per reader), ``holds`` (leases of other engines),
            ``peers`` that it knows and will forget when nothing was asked of them for ``idle_peer_s``,
            ``reads``, ``flights`` of the transfer agent and ``slots`` of the arena.
        """
        return self._producer.in_use() | self._consumer.in_use() | self._data.in_use()

    def close(self) -> None:
        """End everything, quietly for all memory. Consumers of offered blocks are told; idempotent."""
        with self._close_lock:
            if not self._closed:
                self._closed = True
                self._driver.close()
                self._running.join()
                self._finalizer.detach()

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- inside -----------------------------------------------------------------------------------------------------

    def _on_the_wire(self, blocks: Any) -> tuple[list[bytes], list[int]]:
        """Block tables of this cache as messages carry them: ids, and first tokens. Raises BlockError."""
        given = tables(self.cache.spec, blocks)
        return [ids_to_wire(table.ids) for table in given], [table.first_token for table in given]

    def _routes(self, peers: Sequence[Peer]) -> list[Router]:
        made = plan([peer.spec for peer in peers if peer.spec is not None], self.cache.spec, convert=self._convert)
        return [
            Router(
                part,
                self._costs,
                slot_nbytes=min(peer.slot_nbytes, self._identity.slot_nbytes),
                addressable=(peer.addressable, self._identity.addressable),
                casts=(peer.casts, self._identity.casts),
                in_flight=self.settings.chunks_in_flight,
                chunk_nbytes=(self.settings.min_chunk_nbytes, self.settings.max_chunk_nbytes),
                only=self._route,
            )
            for peer, part in zip(peers, made.parts, strict=True)
        ]

    def _ended(self, transfer: Transfer) -> None:
        error = transfer.error
        outcome = "done" if error is None else type(error).__name__
        self.metrics.count("kvxfer_transfers_total", outcome=outcome)
        if error is None:
            self.metrics.count("kvxfer_bytes_total", transfer.nbytes)
            if transfer.early_nbytes:
                self.metrics.count("kvxfer_early_bytes_total", transfer.early_nbytes)
            self.metrics.observe("kvxfer_transfer_seconds", transfer.seconds)
            self.metrics.observe("kvxfer_transfer_nbytes", transfer.nbytes)
            self.metrics.observe("kvxfer_descriptors", transfer.descriptors)
            self._events.put(Done(transfer))
        else:
            self._events.put(Failed(transfer, error))


def _checked(ref: LeaseRef) -> LeaseRef:
    """A constructor of msgspec checks nothing; what it let through must fail here and not in the control thread."""
    if not isinstance(ref, LeaseRef):
        raise LeaseRefError(f"a lease is a LeaseRef, not {type(ref).__name__}")
    return LeaseRef.from_obj(ref.to_obj())


def _completions(after: Any) -> tuple[Completion, ...]:
    try:
        ends = tuple(after)
    except TypeError:
        ends = (after,)
    for each in ends:
        if not isinstance(each, Completion):
            raise ConfigError(f"what is waited for must be able to say done and wait: {each!r:.200}")
    return ends


def _casts(cache: KVCache) -> frozenset[str]:
    """Dtypes that all devices of a cache turn into its own, and back."""
    own = cache.spec.dtype
    pairs = {dtype: ((own, dtype), (dtype, own)) for dtype in CASTABLE}
    return frozenset(
        dtype for dtype, both in pairs.items() if all(b.can_cast(*pair) for b in cache.buffers for pair in both)
    )


def _interval(tokens: Any) -> tuple[int, int | None]:
    try:
        start, stop = tokens
        first, end = index(start), None if stop is None else index(stop)
    except (TypeError, ValueError) as error:
        raise BlockError(f"tokens must be (start, stop), not {tokens!r}") from error
    if not 0 <= first <= (MAX_TOKENS if end is None else end) <= MAX_TOKENS:
        raise BlockError(f"tokens {tokens!r} are no interval")
    return first, end


def _route(route: Route | str) -> Route:
    try:
        return Route(route)
    except ValueError:
        raise ConfigError(f"unknown route {route!r}; known are {', '.join(each.value for each in Route)}") from None


def _forgotten(driver: Driver, running: Running) -> None:
    driver.close()
    running.join(10)
