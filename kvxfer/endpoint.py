# SPDX-License-Identifier: Apache-2.0
"""`Endpoint`: the object through which an engine leases and reads KV. One per rank; producer and consumer at once."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from kvxfer import registry
from kvxfer.addresses import parse
from kvxfer.buffers.cache import KVCache
from kvxfer.config import MAX_S, Settings
from kvxfer.errors import BlockError, ClosedError, ConfigError, LeaseError, shown
from kvxfer.layout.block_table import check_tables, ids_to_wire
from kvxfer.metrics import Metrics
from kvxfer.planner.costs import Costs
from kvxfer.protocol.consumer import Consumer
from kvxfer.protocol.grants import most_ids
from kvxfer.protocol.lease_board import LeaseBoard
from kvxfer.protocol.lease_ref import LeaseRef
from kvxfer.protocol.lease_table import LeaseTable
from kvxfer.protocol.messages import Address
from kvxfer.protocol.peer import Identity
from kvxfer.protocol.producer import Producer
from kvxfer.protocol.transfer import Event, LeaseRevoked, Transfer
from kvxfer.runtime import arguments
from kvxfer.runtime.control_loop import ControlLoop
from kvxfer.runtime.data_loop import DataLoop
from kvxfer.runtime.environment import REAL, is_own_thread
from kvxfer.runtime.events import Events, TransferEnds
from kvxfer.runtime.routes import Routes, casts
from kvxfer.runtime.target_blocks import TargetBlocks
from kvxfer.secret import Secret

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from kvxfer.buffers.base import Completion
    from kvxfer.planner.router import Route
    from kvxfer.runtime.environment import Environment, Running
    from kvxfer.runtime.staging import Staging

_log = logging.getLogger(__name__)


class Endpoint:
    """Moves the KV of requests between this process's cache and those of others.

    All methods may be called from any thread, never block on the network, and raise only for what the caller itself
    did wrong; whatever a peer does ends as an event, a failed `Transfer` or a counted refusal.

    Args:
        cache: this rank's KV cache. Its memory must stay where it is until `close`.
        agent: what moves the bytes: a name of the registry, or a callable that makes an agent from its name. A callable that has an
            argument ``loopback_only`` is told by it whether ``bind`` is reached from this machine only (see `TransferAgent`).
        bind: control address to listen on, ``tcp://host:port``; port 0 takes a free one (see `address`). A host name means all of
            its addresses that this machine has, ``localhost`` both loopback addresses, ``*`` all addresses of IPv4 and IPv6.
        name: of this engine, unique among its peers and new at each start; random by default.
        agent_options: for the adapter, see its documentation. Only with a registry name.
        advertise: host by which peers reach ``bind``, if that is not what was bound: a numeric address or a name, without a port.
        settings: times and limits; by default from the environment, see `Settings.resolve`.
        convert: elements of other dtypes may be converted on the way into this cache; else such a producer is refused.
        costs: by which routes are chosen; by default as ``kvxfer bench calibrate`` measured them, see `Costs.load`.
        route: take this route and no other, for measuring and for tests.
        verify: of each read compare what arrived with what its source has (docs/integrity.md). Takes about as long as to hash it.
        secret: of all endpoints that may talk to each other, whose control channel it then authenticates and encrypts; by default
            from the environment, see `Secret.resolve`.
        allow_unauthenticated: without a secret, ``bind`` may be an address that other machines reach. By default if
            ``KVXFER_ALLOW_UNAUTHENTICATED`` is 1.
        on_event: called after each event has come that `poll` would return, to wake an engine that sleeps, such as
            `threading.Event.set`. On kvxfer's threads: it has to return at once.
        environment: clock, channel and threads; another one for simulators only.

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
        on_event: Callable[[], object] | None = None,
        environment: Environment = REAL,
    ) -> None:
        if cache is None:
            raise ConfigError("cache must be a kvxfer.KVCache, not None")
        for option, kind, what in (
            (cache, KVCache, "cache"),
            (settings, Settings, "settings"),
            (costs, Costs, "costs"),
            (secret, Secret, "secret"),
        ):
            arguments.instance_of(option, kind, what)
        arguments.text(bind, "bind")
        if agent_options is not None and not isinstance(agent_options, Mapping):
            raise ConfigError(f"agent_options must be a mapping, not {agent_options!r:.200}")
        self._now = environment.now
        self.settings: Settings = settings if settings is not None else Settings.resolve()
        self.metrics: Metrics = Metrics()
        self.epoch: str = secrets.token_hex(8)
        self.name: str = (
            f"{socket.gethostname()}-{secrets.token_hex(6)}" if name is None else arguments.name_of_engine(name)
        )
        if not self.name.isprintable():
            raise ConfigError(f"name must be printable, for it stands in logs and messages: {self.name!r}")
        self.cache: KVCache = cache
        arguments.check_description(cache.spec, self.settings)
        if on_event is not None and not callable(on_event):
            raise ConfigError(f"on_event must be callable, not {on_event!r:.200}")
        self._events = Events(self.metrics, on_event)
        self._targets = TargetBlocks(cache.spec)
        self._ended = TransferEnds(self.metrics, self._events, self._targets)
        self._verify = verify
        costs = costs if costs is not None else Costs.load()
        only = None if route is None else arguments.route(route)
        board = LeaseBoard(self.settings.max_leases)
        if allow_unauthenticated is None:
            allow_unauthenticated = os.environ.get("KVXFER_ALLOW_UNAUTHENTICATED") == "1"
        channel = environment.channel(
            bind,
            settings=self.settings,
            metrics=self.metrics,
            advertise=advertise,
            secret=secret if secret is not None else Secret.resolve(),
            allow_unauthenticated=allow_unauthenticated,
        )
        # Nothing that a thread holds leads to this object: one that is forgotten can be collected, and then ends.
        self._driver = driver = ControlLoop(channel, self.metrics, self._events.put, environment.now)
        data: DataLoop | None = None
        try:
            maker = registry.agent_maker(
                agent,
                dict(agent_options or {}),
                f"{self.name}/{cache.spec.rank}/{self.epoch}",
                loopback=channel.loopback,
            )
            gain = costs.write_gain
            data = DataLoop(
                maker, cache, board, self.settings, self.metrics, driver.reports, environment, write_gain=gain
            )
            adapter, agent_info = data.start()
            addressable = all(buffer.memory is not None for buffer in cache.buffers)
            me = Identity(
                self.name,
                self.epoch,
                adapter,
                agent_info,
                cache.spec,
                addressable,
                data.arena.slot_nbytes,
                casts(cache),
                writes=data.writes,
                spoken=environment.spoken,
            )
            table = LeaseTable(self.settings, board)
            routes = Routes(me, self.settings, costs, convert, only)
            self._producer = Producer(me, table, self.settings, self.metrics, driver.actions)
            self._consumer = Consumer(me, self.settings, self.metrics, driver.actions, routes)
            self.address: str = channel.address
            """Addresses at which peers find this endpoint, for `LeaseRef.addresses`."""
            driver.drive(self._producer, self._consumer, data)
            self._running = environment.run("kvxfer-control", driver)
        except BaseException:
            if data is not None:
                data.close()
            channel.close()
            raise
        self._data = data
        # Daemon threads inside vendor code at interpreter exit crash: an endpoint that was not closed is closed then.
        self._finalizer = weakref.finalize(self, _forgotten, driver, self._running)
        _log.info("kvxfer endpoint %s at %s by %s: %s", self.name, self.address, adapter, self.settings.describe())

    # -- producer ---------------------------------------------------------------------------------------------------

    def announce(
        self, ref: LeaseRef | None = None, *, request: str = "", num_tokens: int = 0, digest: str = ""
    ) -> LeaseRef:
        """Make a lease known before its blocks are complete, so that a consumer that asks before that waits instead of failing.

        Args:
            ref: minted elsewhere (`LeaseRef.mint`); by default one is minted here from the other arguments.

        Returns:
            the reference that travels with the request. After `close` no lease can be read by it.

        Raises:
            ConfigError: without ``ref`` on an engine of several ranks: one rank does not know the addresses of the others.
                Or ``request`` is no string.
            LeaseRefError: ``ref`` is none, or a field is out of range.
        """
        if ref is not None:
            ref = arguments.reference(ref)
        elif self.cache.spec.world > 1:
            raise ConfigError(
                f"an engine of {self.cache.spec.world} ranks mints one lease for all of them: LeaseRef.mint with the address "
                "of each, and every rank announces it"
            )
        else:
            request = arguments.text(request, "request")
            ref = LeaseRef.mint(
                producer=self.name, addresses=[self.address], request=request, num_tokens=num_tokens, digest=digest
            )
        token, request, producer = ref.token, ref.request, self._producer
        self._driver.command(lambda now: producer.announce(token, request, now))
        return ref

    def publish(self, ref: LeaseRef, blocks: Any, *, complete: bool = True, after: Sequence[Completion] = ()) -> None:
        """Make the blocks of an announced lease readable. They must not change until the lease's end event.

        While prefill goes on, publish as often as more blocks are complete, with ``complete=False``: a consumer that waits
        begins to read them. The last call has ``complete=True``. After that, exactly one of LeaseReleased, LeaseExpired and
        LeaseRevoked follows, ``lease_s`` after the blocks are complete at the latest unless a consumer renews; at once after
        `close`. A lease that ends before its last call has no end event, for its blocks are in use by prefill anyway.

        Args:
            blocks: all blocks that are complete by now, with those that were published before: block ids per cache group in
                token order, or a `BlockTable` where they do not begin with the first token; the plain sequence or table for a
                cache of one group. Blocks that do not begin with those published before revoke the lease.
            complete: these are all blocks of the request. Otherwise give no block that is partly filled, and none of sliding
                windows and states, whose blocks change until prefill ends.
            after: what devices are still doing to these blocks (`Completion`, such as an event that was recorded behind
                the kernels): they are not read before it has ended, and if it fails the lease is revoked. What is published
                later counts after it too. Asked by kvxfer's own thread, every millisecond at first. If it has not ended
                ``lease_s`` from now, LeaseExpired follows: the blocks will not be read, and are the engine's own as soon as
                its device has done with them; kvxfer cannot tell when. By default the blocks are complete now.

        Raises:
            BlockError: not blocks of this cache.
            ConfigError: something in ``after`` is no `Completion`.
            LeaseRefError: ``ref`` is none.
            LeaseError: the complete blocks were published before, and no event has told yet how that lease ended. Nothing
                changes.
        """
        raw, firsts = self._on_the_wire(blocks)
        token, request, ends = arguments.reference(ref).token, ref.request, arguments.completions(after)
        producer = self._producer
        if not complete:
            self._driver.command(
                lambda now: producer.publish(token, raw, now, firsts, ends, complete=False),
                broken=lambda error, _: producer.broken(token, error, end_awaited=False),
            )
            return
        if not producer.may_publish(token):
            raise LeaseError(
                f"lease {shown(token)} was published before: wait for its end event before publishing it again"
            )
        if not self._driver.command(
            lambda now: producer.publish(token, raw, now, firsts, ends),
            broken=lambda error, _: producer.broken(token, error, end_awaited=True),
        ):
            self._events.put(LeaseRevoked(token, request))  # closed: the blocks will not be read

    def join(self, addresses: Sequence[str]) -> None:
        """Say where all ranks of this engine listen, for consumers whose lease names the first one only.

        To be called once, before consumers are told of this engine.

        Args:
            addresses: control addresses in rank order.

        Raises:
            ConfigError: they are not one for each rank.
        """
        try:
            checked = msgspec.convert(list(addresses), list[Address])
            for address in checked:
                parse(address)
        except (msgspec.ValidationError, ConfigError, TypeError) as error:
            raise ConfigError(f"addresses of ranks: {error}") from error
        if len(checked) != self.cache.spec.world:
            raise ConfigError(f"{len(checked)} addresses for {self.cache.spec.world} ranks")
        producer = self._producer
        self._driver.command(lambda _: producer.joined(checked))

    def lease(self, blocks: Any, *, request: str = "", num_tokens: int = 0, digest: str = "") -> LeaseRef:
        """`announce` and `publish` in one: blocks that are complete already."""
        check_tables(self.cache.spec, blocks)  # a bad call announces nothing
        ref = self.announce(request=request, num_tokens=num_tokens, digest=digest)
        self.publish(ref, blocks)
        return ref

    def revoke(self, ref: LeaseRef, reason: str = "revoked by the producer") -> None:
        """End a lease early. LeaseRevoked follows if its blocks were complete and it had not ended before.

        Raises:
            ConfigError: ``reason`` is no string.
            LeaseRefError: ``ref`` is none.
        """
        token, why, producer = arguments.reference(ref).token, arguments.text(reason, "reason")[:1024], self._producer
        self._driver.command(
            lambda _: producer.revoke(token, why),
            broken=lambda error, _: producer.broken(token, error, end_awaited=False),
        )

    # -- consumer ---------------------------------------------------------------------------------------------------

    def acquire(self, ref: LeaseRef) -> None:
        """Acquire a lease ahead of its `read` and keep it alive, for ``unread_lease_s`` at the longest, until read or released.

        No effect after `close`.

        Raises:
            LeaseRefError: ``ref`` is none.
        """
        ref, consumer = arguments.reference(ref), self._consumer
        self._driver.command(
            lambda now: consumer.acquire(ref, now),
            broken=lambda error, now: consumer.broken(ref.token, "", error, now),
        )

    def read(
        self,
        ref: LeaseRef,
        into: Any,
        *,
        tokens: tuple[int, int | None] | None = None,
        timeout_s: float | None = None,
        verify: bool | None = None,
        after: Sequence[Completion] = (),
        tag: Any = None,
    ) -> Transfer:
        """Read a lease's KV into this cache, whatever the producer's looks like; returns at once. A lease is read once.

        Args:
            into: target block ids per cache group in token order; the plain sequence for a cache of one group. They begin
                with the block in which the first token to be read lies; a `BlockTable` says so for itself.
            tokens: read only the request's tokens ``[start, stop)``, whose first ones this cache has already, say; stop
                None means to the end. By default all that ``into`` holds and the lease has.
            timeout_s: the transfer ends by then, well or not. By default in ``read_timeout_s``, and ``rendezvous_timeout_s`` and
                ``announce_timeout_s`` later if ``ref`` was `LeaseRef.for_rendezvous`, so that prefill has its time.
            verify: compare what arrived with what its source has; by default as the endpoint was told. What differs fails the
                transfer by `IntegrityError`, which says where.
            after: nothing is written to ``into`` before all of these have ended: what this side's devices still do with those
                blocks, for the requests that had them before (`DeviceBuffer.mark`). One that fails, fails the transfer, and one that
                does not end ends it by its deadline.
            tag: anything of the engine's, as `Transfer.tag`: the request that waits for these blocks, say.

        Returns:
            a transfer that ends in Done or Failed, after `close` in Failed by ClosedError. Until then the target blocks
            belong to kvxfer.

        Raises:
            BlockError: not blocks of this cache, or one twice, or one into which another read is under way; or ``tokens`` is no
                interval.
            ConfigError: ``timeout_s`` is no number of seconds, or ``after`` holds something that cannot be waited for.
            LeaseRefError: ``ref`` is none.
        """
        if not self._consumer.knows(ref):
            ref = arguments.reference(ref)
        after = arguments.completions(after)
        if tokens is not None:
            tokens = arguments.interval(tokens)
        targets = check_tables(self.cache.spec, into, "target", first_token=tokens[0] if tokens else 0, distinct=True)
        wait_s = timeout_s
        if wait_s is None:
            wait_s = self.settings.read_timeout_s
            if ref.rendezvous:
                wait_s = min(wait_s + self.settings.rendezvous_timeout_s + self.settings.announce_timeout_s, MAX_S)
        deadline = self._now() + arguments.seconds(wait_s, "timeout_s")
        transfer = Transfer(
            ref,
            targets,
            tokens,
            deadline,
            self._ended,
            self._now,
            verify=self._verify if verify is None else verify,
            after=after,
            tag=tag,
        )
        self._targets.take(targets)
        # The control thread is told of each read, and woken for those whose lease was not granted ahead: it starts them.
        consumer, job = self._consumer, self._consumer.claim(transfer)
        claimed = job is not None
        accepted = self._driver.command(
            lambda now: consumer.read(transfer, now, claimed=claimed),
            wake=not claimed,
            broken=None if claimed else lambda error, now: consumer.read_broken(transfer, error, now),
        )
        if not accepted:
            transfer.end(ClosedError("the endpoint was closed"))
        elif job is not None:
            self._data.do(job)
        return transfer

    def granted(self, ref: LeaseRef) -> bool:
        """Tell whether an acquired lease could be read at once: its blocks are complete, and every rank of its producer was met.

        Raises:
            LeaseRefError: ``ref`` is none.
        """
        return self._consumer.granted(arguments.reference(ref).token)

    def release(self, ref: LeaseRef) -> None:
        """The blocks are not needed: the producer gets them back at once. No effect after `close`.

        A read that still waits for blocks of its producer ends in Failed by LeaseError. One that has been granted all of them goes on:
        the producer gets its blocks back when that has ended.

        Raises:
            LeaseRefError: ``ref`` is none.
        """
        ref, consumer = arguments.reference(ref), self._consumer
        self._driver.command(
            lambda now: consumer.release(ref, now),
            broken=lambda error, now: consumer.broken(ref.token, "", error, now),
        )

    @property
    def staging(self) -> Staging:
        """The arena in which chunks of packed transfers lie."""
        return self._data.arena.staging

    # -- both -------------------------------------------------------------------------------------------------------

    def poll(self, timeout_s: float = 0.0) -> list[Event]:
        """Events since the last call; waits up to ``timeout_s`` for the first event. Each comes once.

        From the first call on nothing is lost. Before it, the ends of transfers are kept for the newest 4,096 only
        (`kvxfer.runtime.events`): an engine that only waits for its transfers need not poll. Ends of leases are always kept.

        Raises:
            ConfigError: ``timeout_s`` is no number.
        """
        return self._events.poll(arguments.finite(timeout_s))

    def in_use(self) -> dict[str, int]:
        """Numbers of what is in use at this moment; all 0 when nothing is under way and all peers are forgotten. Any thread.

        Returns:
            as a producer: ``leases`` with their ``lease_cells`` on the board and ``lease_timers``, ``deferred_steps`` that wait
            for a device, ``chunks`` per consumer's rank, of which some are ``packing`` (or wait for a slot), some ``packed``,
            for so many ``packed_consumers``, ``requested_writes`` of consumers, of which so many ``writes`` are under way, and
            ``agents_written_to``;
            as a consumer: ``held_leases`` of other engines with their ``held_timers``, of which ``granted_leases`` could be read at
            once, what is ``asked`` of producers, ``reads`` with the ``read_nbytes`` that they have moved so far, their
            ``flights`` of the transfer agent, ``copies`` of devices, ``scratch_cells`` and ``target_blocks``, ``waiters`` for a
            slot or a scratch cell, and ``contacts`` with agents from which nothing was read before;
            as both: ``slots`` of the arena and unpolled ``events``;
            and what is kept until nothing was asked of a peer for ``idle_peer_s``: ``peers``, ``peer_timers``, ``agent_peers``.
        """
        own = {"target_blocks": self._targets.in_use, "events": self._events.unpolled}
        return self._producer.in_use() | self._consumer.in_use() | self._data.in_use() | own

    def close(self) -> None:
        """End everything, quietly for all memory. Consumers of leased blocks are told.

        Returns when all has ended, also where it is called several times: by another thread, a signal handler, or after a call
        that was interrupted. Only on a thread of kvxfer's own, such as in a `Completion`, it returns at once, and what runs
        there ends later.
        """
        self._driver.close()
        if not is_own_thread():
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
        given = check_tables(self.cache.spec, blocks)
        number, most = sum(len(table.ids) for table in given), most_ids(self.cache.spec)
        if number > most:
            raise BlockError(f"{number} block ids are more than one lease may have with a cache of this size: {most}")
        return [ids_to_wire(table.ids) for table in given], [table.begins_at for table in given]


def _forgotten(driver: ControlLoop, running: Running) -> None:
    """Close an endpoint that was not closed, when no reference to it is left or the interpreter ends."""
    driver.close()
    running.join_at_exit()
