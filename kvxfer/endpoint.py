# SPDX-License-Identifier: Apache-2.0
"""`Endpoint`: what an engine holds. One per rank; producer and consumer at once."""

from __future__ import annotations

import logging
import queue
import secrets
import socket
import threading
import time
import weakref
from collections import deque
from operator import index
from typing import TYPE_CHECKING, Any, Union

import numpy as np

from kvxfer import registry
from kvxfer.actions import Action, Emit, ForgetAgent, Hangup, Reply, SendTo, StartRead
from kvxfer.agent import TransferAgent
from kvxfer.blocks import tables
from kvxfer.config import MAX_S, Settings
from kvxfer.consumer import Consumer
from kvxfer.control import ControlChannel
from kvxfer.datapath import DataPath
from kvxfer.errors import BlockError, ClosedError, ConfigError, LeaseRefError, UnsupportedError
from kvxfer.fence import LeaseBoard
from kvxfer.lease import LeaseRef, LeaseTable
from kvxfer.metrics import Metrics
from kvxfer.peer import Identity
from kvxfer.producer import Producer
from kvxfer.transfer import Done, Event, Failed, LeaseRevoked, Transfer
from kvxfer.wire import MAX_NAME

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType

    from kvxfer.cache import KVCache

    Command = Callable[[float], object]

_log = logging.getLogger(__name__)

AgentChoice = Union[str, "Callable[[str], TransferAgent]"]


class Endpoint:
    """Moves the KV of requests between this process's cache and those of others.

    All methods may be called from any thread, never block on the network, and raise only for what the caller itself
    did wrong; whatever a peer does ends as an event, a failed `Transfer` or a counted refusal.

    Args:
        cache: this rank's KV cache. Its memory must stay where it is until `close`.
        agent: what moves the bytes: a name of the registry, or a callable that makes an agent from its name.
        bind: control address to listen on, ``tcp://host:port``; port 0 takes a free one (see `address`).
        name: of this engine, unique among its peers and new at each start; random by default.
        agent_options: for the adapter, see its documentation. Only with a registry name.
        advertise: host by which peers reach ``bind``, if that is not what was bound.
        settings: times and limits; by default from the environment, see `Settings.resolve`.

    Raises:
        ConfigError: an option is wrong, or the address cannot be bound.
        UnavailableError: the adapter cannot run here.
        RegistrationError: the transfer engine refuses the cache's memory.
    """

    def __init__(
        self,
        cache: KVCache,
        agent: AgentChoice = "nixl",
        *,
        bind: str = "tcp://127.0.0.1:0",
        name: str | None = None,
        agent_options: Mapping[str, Any] | None = None,
        advertise: str | None = None,
        settings: Settings | None = None,
    ) -> None:
        self.settings: Settings = settings if settings is not None else Settings.resolve()
        self.metrics: Metrics = Metrics()
        self.epoch: str = secrets.token_hex(8)
        self.name: str = name if name is not None else f"{socket.gethostname()}-{secrets.token_hex(6)}"
        if not 0 < len(self.name) <= MAX_NAME:
            raise ConfigError(f"name must have 1 to {MAX_NAME} characters, not {len(self.name)}")
        self.cache: KVCache = cache
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._commands: deque[Command] = deque()
        self._command_lock = threading.Lock()
        self._accepting = True
        self._actions: list[Action] = []
        self._closing = threading.Event()
        self._close_lock = threading.Lock()
        memories = [buffer.memory for buffer in cache.buffers]
        if None in memories:
            raise UnsupportedError("this cache's device has no registrable memory, and staging is not built yet")
        board = LeaseBoard(self.settings.max_leases)
        self._channel = ControlChannel(bind, self.settings, self.metrics, advertise)
        try:
            self._data = DataPath(
                self._agent_maker(agent, dict(agent_options or {})),
                [memory for memory in memories if memory is not None],
                board,
                self.settings,
                self.metrics,
                ended=lambda transfer, error: self._command(
                    lambda now: self._consumer.read_ended(transfer, error, now)
                ),
                replaced=lambda info: self._command(lambda _: self._producer.agent_replaced(info)),
            )
            adapter, agent_info = self._data.start()
        except BaseException:
            self._channel.close()
            raise
        self._identity = Identity(self.name, self.epoch, adapter, agent_info, cache.spec)
        table = LeaseTable(self.settings, board)
        self._producer = Producer(self._identity, table, self.settings, self.metrics, self._actions)
        self._consumer = Consumer(self._identity, self.settings, self.metrics, self._actions)
        self.address: str = self._channel.address
        """Where peers find this endpoint, for `LeaseRef.addresses`."""
        self._thread = threading.Thread(target=self._run, name="kvxfer-control", daemon=True)
        self._thread.start()
        # Daemon threads inside vendor code at interpreter exit crash; an engine that forgets close() is forgiven.
        self._finalizer = weakref.finalize(self, _forgotten, self._channel, self._closing, self._thread)
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
            LeaseRefError: ``ref`` is none, or a field is out of range.
        """
        if ref is not None:
            ref = _checked(ref)
        else:
            ref = LeaseRef.mint(
                owner=self.name, addresses=[self.address], request=request, num_tokens=num_tokens, digest=digest
            )
        token, request = ref.token, ref.request
        self._command(lambda now: self._producer.announce(token, request, now))
        return ref

    def offer(self, ref: LeaseRef, blocks: Any) -> None:
        """The announced lease's blocks are complete. They must not change until the lease's end event.

        Exactly one of LeaseSettled, LeaseExpired, LeaseRevoked follows, ``lease_s`` from now at the latest unless a
        consumer renews.

        Args:
            blocks: block ids per cache group in token order; the plain sequence for a cache of one group.

        Raises:
            BlockError: not blocks of this cache.
            LeaseRefError: ``ref`` is none.
        """
        raw = [table.ids.astype("<u4").tobytes() for table in tables(self.cache.spec, blocks)]
        token, request = _checked(ref).token, ref.request
        if not self._command(lambda now: self._producer.offer(token, raw, now)):
            self._events.put(LeaseRevoked(token, request))  # closed: nobody will read them

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
        self._command(lambda _: self._producer.revoke(token, reason[:1024]))

    # -- consumer ---------------------------------------------------------------------------------------------------

    def hold(self, ref: LeaseRef) -> None:
        """Open a lease ahead of its `read` and keep it alive, for ``hold_s`` at the longest, until read or dropped.

        Raises:
            LeaseRefError: ``ref`` is none.
        """
        ref = _checked(ref)
        self._command(lambda now: self._consumer.hold(ref, now))

    def read(
        self,
        ref: LeaseRef,
        into: Any,
        *,
        skip_blocks: int | Sequence[int] = 0,
        timeout_s: float | None = None,
    ) -> Transfer:
        """Read a lease's blocks into this cache; returns at once. A lease can be read once.

        Args:
            into: target block ids per cache group in token order; the plain sequence for a cache of one group.
            skip_blocks: leading blocks of the lease (per group) that are not needed.
            timeout_s: the transfer ends by then, well or not; ``read_timeout_s`` by default.

        Returns:
            a transfer that ends in Done or Failed. Until then the target blocks belong to kvxfer.

        Raises:
            BlockError: not blocks of this cache, or one twice; or ``skip_blocks`` does not fit.
            ConfigError: ``timeout_s`` is no number of seconds.
            LeaseRefError: ``ref`` is none.
        """
        ref = _checked(ref)
        targets = [table.ids for table in tables(self.cache.spec, into)]
        for ids in targets:
            if not (ids[1:] > ids[:-1]).all() and len(np.unique(ids)) != len(ids):
                raise BlockError("a target block is named twice")
        skips = _skips(skip_blocks, len(targets))
        wait_s = self.settings.read_timeout_s if timeout_s is None else timeout_s
        if not isinstance(wait_s, (int, float)) or not 0 <= wait_s <= MAX_S:
            raise ConfigError(f"timeout_s must be a number of seconds, not {timeout_s!r}")
        deadline = time.monotonic() + wait_s
        transfer = Transfer(ref, targets, skips, deadline, self._ended)
        # A lease that was granted ahead needs the control thread for nothing: it is told of the read, but not woken.
        job = self._consumer.take(transfer)
        if job is None:
            accepted = self._command(lambda now: self._consumer.read(transfer, now))
        else:
            accepted = self._command(lambda _: self._consumer.reading(transfer), wake=False)
        if not accepted:
            transfer.end(ClosedError("the endpoint was closed"))
        elif job is not None:
            self._data.do(job)
        return transfer

    def drop(self, ref: LeaseRef) -> None:
        """The blocks are not needed: the producer gets them back at once. No effect on a lease being read.

        Raises:
            LeaseRefError: ``ref`` is none.
        """
        ref = _checked(ref)
        self._command(lambda now: self._consumer.drop(ref, now))

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

    def close(self) -> None:
        """End everything, quietly for all memory. Consumers of offered blocks are told; idempotent."""
        with self._close_lock:
            if self._closing.is_set():
                return
            self._closing.set()
            self._channel.wake()
            self._thread.join()
            self._finalizer.detach()

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- inside -----------------------------------------------------------------------------------------------------

    def _agent_maker(self, agent: AgentChoice, options: dict[str, Any]) -> Callable[[], TransferAgent]:
        if callable(agent):
            make: Callable[..., TransferAgent] = agent
            if options:
                raise ConfigError("agent_options go with an agent's name, not with a callable")
        else:
            loaded = registry.load(agent)
            if not issubclass(loaded, TransferAgent):
                raise ConfigError(f"{agent!r} is no TransferAgent")
            make = loaded
        made = 0

        def make_next() -> TransferAgent:
            nonlocal made
            made += 1
            try:
                return make(f"{self.name}/{self.cache.spec.rank}/{self.epoch}/{made}", **options)
            except TypeError as error:
                raise ConfigError(f"agent_options {sorted(options)} do not fit {agent!r}: {error}") from error

        return make_next

    def _command(self, command: Command, *, wake: bool = True) -> bool:
        """Have the control thread run it, when it next has something to do or at once; False if it has run its last."""
        with self._command_lock:
            if not self._accepting:
                return False
            self._commands.append(command)
        if wake:
            self._channel.wake()
        return True

    def _ended(self, transfer: Transfer) -> None:
        error = transfer.error
        outcome = "done" if error is None else type(error).__name__
        self.metrics.count("kvxfer_transfers_total", outcome=outcome)
        if error is None:
            self.metrics.count("kvxfer_bytes_total", transfer.nbytes)
            self.metrics.observe("kvxfer_transfer_seconds", transfer.seconds)
            self.metrics.observe("kvxfer_transfer_nbytes", transfer.nbytes)
            self.metrics.observe("kvxfer_descriptors", transfer.descriptors)
            self._events.put(Done(transfer))
        else:
            self._events.put(Failed(transfer, error))

    # -- the control thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closing.is_set():
            self._guarded(self._turn)
        # Consumers are told before a copy that still runs is waited for.
        for step in (self._run_commands, self._producer.close, self._perform, self._data.close):
            self._guarded(step)
        with self._command_lock:
            self._accepting = False
        # The last commands: among them the reads that the data thread ended just now. Then everything has ended.
        for step in (self._run_commands, self._producer.close, self._consumer.close, self._perform):
            self._guarded(step)
        self._channel.close()

    def _turn(self) -> None:
        self._run_commands()
        now = time.monotonic()
        self._guarded(lambda: self._producer.tick(now))
        self._guarded(lambda: self._consumer.tick(now))
        self._perform()
        if self._commands:
            return
        deadlines = [d for d in (self._producer.next_deadline(), self._consumer.next_deadline()) if d is not None]
        timeout_s = max(0.0, min(deadlines) - time.monotonic()) if deadlines else None
        for inbound in self._channel.receive(timeout_s):
            # A peer may know of a lease through the engine's own channels before this thread has seen the command.
            self._run_commands()
            self._guarded(lambda: self._take(inbound.source, inbound))  # noqa: B023 - runs before the next one
            self._perform()

    def _take(self, source: bytes | str, inbound: Any) -> None:
        now = time.monotonic()
        if isinstance(source, bytes):
            if inbound.message is None:
                self._producer.garbage(source, inbound.reason, inbound.why)
            else:
                self._producer.received(source, inbound.message, now)
        elif inbound.message is None:
            self._consumer.garbage(source, inbound.why)
        else:
            self._consumer.received(source, inbound.message, now)

    def _run_commands(self) -> None:
        while self._commands:
            command = self._commands.popleft()
            self._guarded(lambda: command(time.monotonic()))  # noqa: B023 - runs before the next one

    def _perform(self) -> None:
        while self._actions:  # an address that cannot be connected to adds to them
            actions, self._actions[:] = list(self._actions), []
            for action in actions:
                self._guarded(lambda: self._do(action))  # noqa: B023 - runs before the next one

    def _do(self, action: Action) -> None:
        if isinstance(action, SendTo):
            try:
                self._channel.send(action.address, action.message)
            except ConfigError as error:
                self._consumer.unreachable(action.address, str(error), time.monotonic())
        elif isinstance(action, Reply):
            self._channel.reply(action.connection, action.message)
        elif isinstance(action, (StartRead, ForgetAgent)):
            self._data.do(action)
        elif isinstance(action, Hangup):
            self._channel.hangup(action.address)
        elif isinstance(action, Emit):
            self._events.put(action.event)

    def _guarded(self, step: Callable[[], object]) -> None:
        """No fault of ours, and nothing a peer can send, ends this thread."""
        try:
            step()
        except Exception:  # noqa: BLE001 - logged with its trace; the thread goes on
            self.metrics.count("kvxfer_internal_errors_total", where="control")
            _log.exception("fault in the control thread; it goes on")


def _checked(ref: LeaseRef) -> LeaseRef:
    """A constructor of msgspec checks nothing; what it let through must fail here and not in the control thread."""
    if not isinstance(ref, LeaseRef):
        raise LeaseRefError(f"a lease is a LeaseRef, not {type(ref).__name__}")
    return LeaseRef.from_obj(ref.to_obj())


def _skips(skip_blocks: Any, groups: int) -> list[int]:
    try:
        one = not hasattr(skip_blocks, "__len__")
        skips = [index(skip_blocks)] * groups if one else [index(skip) for skip in skip_blocks]
    except TypeError as error:
        raise BlockError(f"skip_blocks must be whole numbers, not {skip_blocks!r}") from error
    if len(skips) != groups or any(skip < 0 for skip in skips):
        raise BlockError(f"skip_blocks {skip_blocks!r} does not fit {groups} cache groups")
    return skips


def _forgotten(channel: ControlChannel, closing: threading.Event, thread: threading.Thread) -> None:
    closing.set()
    channel.wake()
    if thread is not threading.current_thread():
        thread.join(timeout=10)
