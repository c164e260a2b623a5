# SPDX-License-Identifier: Apache-2.0
"""NIXL as a kvxfer transfer agent.

Facts about NIXL 1.5.1 that shaped this file (measured; each has its test in tests/nixl):

- The Python class `nixl_agent` hard-codes a progress delay of 0, which makes an idle agent spin on one core. The C++ agent
  below it, in `_bindings`, takes the delay; there it is the longest sleep of a thread that wakes on events, so a long delay
  costs no latency. This adapter therefore calls the bindings, which are the same in all of NIXL's packages.
- Only the end of the agent stops a transfer in flight. Handles are therefore released only when NIXL has said that they are
  complete; all others are kept until `close`.
- Over TCP, the end of an agent whose READ is in flight can crash the healthy process that it reads from (SIGSEGV, 5 of 8
  with 2,048 descriptors). `close` therefore waits a while for such reads.
- A transfer on one host is a copy inside the call that posts it, with the GIL released.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec
import numpy as np

from kvxfer.agents.base import TransferAgent
from kvxfer.agents.capabilities import Capabilities, LinkFacts, Op, Reach
from kvxfer.agents.ports import Port, open_ports
from kvxfer.errors import ConfigError, PeerInfoError, TransferError, UnavailableError
from kvxfer.memory.spans import Descriptors, Memory, MemoryKind
from kvxfer_nixl import _errors
from kvxfer_nixl._ibverbs import without_exit_crash
from kvxfer_nixl._link import Link, LinkWatch, Surroundings, predict
from kvxfer_nixl._metadata import agent_name
from kvxfer_nixl._module import find
from kvxfer_nixl._options import NixlOptions
from kvxfer_nixl._records import NixlDescription, NixlPeer, XferRequest
from kvxfer_nixl._ucx import warn_of_open_ports

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from kvxfer.agents.description import AgentPeer
    from kvxfer.agents.finding import Finding

_log = logging.getLogger("kvxfer.nixl")

PROGRESS_DELAY_US = 10_000
"""An idle agent costs 0.002 of a core with it (0.012 with 1 ms, 1.0 with NIXL's default of 0), at the same latency."""

RECYCLE_AFTER_CYCLES = 256
"""Each disconnect leaks one file descriptor on either side until the agent ends (UCX): warn after so many."""

_DRAIN_POLL_S = 0.001


class NixlAgent(TransferAgent):
    """Moves bytes with NIXL, between processes and hosts, from and to DRAM and VRAM.

    Args:
        name: see `TransferAgent`.
        backends: NIXL backends to start, by name; UCX and LIBFABRIC, among others, reach peers.
        backend_options: options of each backend, as strings, handed to NIXL as they are. UCX gets ``ucx_error_handling_mode``
            ``peer`` by default: with ``none`` the death of a peer goes unnoticed.
        module: the only module of NIXL to use (one of `kvxfer_nixl._module.NAMES`); by default the first that works.
        progress_delay_us: longest sleep of NIXL's progress thread, which wakes on events; rounded up to milliseconds.
        max_submit_nbytes: most bytes handed to NIXL in one call, which on one host blocks until they are copied.
        drain_s: seconds for which `close` waits for reads over TCP before it ends them (see `Link.STREAM`).
        loopback_only: UCX uses the loopback device only, so that other machines reach none of its ports: over TCP UCX checks no
            key (docs/security.md). `Endpoint` passes False where its control address is reached from other machines.
            ``UCX_NET_DEVICES``, or ``NET_DEVICES`` in ``engine_config``, takes precedence.
        port_range: TCP ports that UCX may listen on, such as ``"40000-40099"``; by default any free ones. An agent takes one
            port on each network device, and a new agent takes others while the one before it ends.

    Raises:
        ConfigError: an option is unknown or out of range.
        UnavailableError: NIXL is not installed, or a backend does not start here.
    """

    adapter: ClassVar[str] = "nixl"
    capabilities: ClassVar[Capabilities] = Capabilities(
        ops=frozenset({Op.READ, Op.WRITE}),
        kinds=frozenset({MemoryKind.DRAM, MemoryKind.VRAM}),
        reach=Reach.NETWORK,
        quiet_on_abandon=False,
        remote_checked=False,
        detects_death=True,
        max_submit_nbytes=64 << 20,
    )

    @classmethod
    def why_unavailable(cls) -> str | None:
        """Reason why no NIXL module can be imported here; None if one can. Whether a backend starts shows only when an agent is made."""
        try:
            find()
        except UnavailableError as error:
            return str(error)
        return None

    @classmethod
    def examine(cls) -> Iterator[Finding]:
        """Findings about NIXL on this machine. Its backends are started, in processes of their own."""
        from kvxfer_nixl._examination import examine  # noqa: PLC0415 - it imports this module

        return examine()

    def __init__(
        self,
        name: str,
        *,
        backends: Sequence[str] = ("UCX",),
        backend_options: Mapping[str, Mapping[str, str]] | None = None,
        module: str | None = None,
        progress_delay_us: int = PROGRESS_DELAY_US,
        max_submit_nbytes: int | None = 64 << 20,
        drain_s: float = 1.0,
        loopback_only: bool = True,
        port_range: str | None = None,
        **unknown: object,
    ) -> None:
        given = {
            "backends": backends,
            "backend_options": {} if backend_options is None else backend_options,
            "module": module,
            "progress_delay_us": progress_delay_us,
            "max_submit_nbytes": max_submit_nbytes,
            "drain_s": drain_s,
            "loopback_only": loopback_only,
            "port_range": port_range,
        }
        options = NixlOptions.of(given | unknown)
        super().__init__(name)
        for_backends, self.loopback_only = options.for_backends()
        self.module = find(options.module)
        """The module of NIXL that is used, and why."""
        self._bindings = self.module.bindings
        self._agent: Any = self._new_agent(options.progress_delay_us)
        before = open_ports()
        try:
            self._backends = {name: self._start_backend(name, its) for name, its in for_backends.items()}
            self._check_reach()
        except BaseException:
            self._agent = None  # the traceback of what is raised here would keep it, and its thread, alive
            raise
        self.ports: tuple[Port, ...] = tuple(sorted(open_ports() - before))
        """TCP ports that the backends opened, as far as the kernel tells."""
        warn_of_open_ports(self.ports)
        self._knows_frame = self._reads_own_frame()
        self._segments = {MemoryKind.DRAM: self._bindings.DRAM_SEG, MemoryKind.VRAM: self._bindings.VRAM_SEG}
        self._backends_of = {kind: self._backends_for(kind) for kind in self._segments}
        # What the class declares holds for the defaults only.
        vars(self)["capabilities"] = replace(
            type(self).capabilities,
            kinds=frozenset(kind for kind, handles in self._backends_of.items() if handles),
            detects_death=for_backends.get("UCX", {}).get("ucx_error_handling_mode") != "none",
            max_submit_nbytes=options.max_submit_nbytes,
        )
        self._surroundings = Surroundings.here(for_backends)
        self._registered: dict[int, Any] = {}
        self._registrations_made = 0
        self._unfinished: dict[int, XferRequest] = {}
        self._drain_s = options.drain_s
        self.connection_cycles = 0
        """Peers disconnected so far. Each one costs a file descriptor on both sides: see `RECYCLE_AFTER_CYCLES`."""

    def link(self, peer: AgentPeer) -> Link:
        """Kind of connection to ``peer``: predicted from the descriptions of both sides, corrected by what transfers show."""
        native: NixlPeer = peer.native
        return native.watch.link

    def explain(self, peer: AgentPeer) -> str:
        """Module, version, backends and kind of link."""
        return f"{self.module.name} {self.module.version}, {'+'.join(self._backends)}, link {self.link(peer).value}"

    def link_kind(self, peer: AgentPeer) -> str:
        """See `link`."""
        return self.link(peer).value

    def link_facts(self, peer: AgentPeer) -> LinkFacts:
        """Facts about the link to ``peer``: a WRITE over TCP ends with the agent, whose process takes the bytes from the socket.

        Between processes of one host the writer copies by itself, whatever became of the agent here. Of RDMA nothing was tried.
        """
        link = self.link(peer)
        return LinkFacts(fate_shared=link.fate_shared, cut_off_by_close=link is Link.STREAM)

    # -- start ------------------------------------------------------------------------------------------------------

    def _new_agent(self, progress_delay_us: int) -> Any:
        config = self._bindings.nixlAgentConfig()
        config.useProgThread = True
        config.useListenThread = False  # that thread listens on all addresses and asks for no password
        config.pthrDelay = progress_delay_us
        # RW lets the progress thread and this one work in parallel; NIXL before 0.9 and RIXL have a single lock.
        config.syncMode = getattr(self._bindings, "NIXL_THREAD_SYNC_RW", self._bindings.NIXL_THREAD_SYNC_STRICT)
        if hasattr(config, "captureTelemetry"):
            config.captureTelemetry = False
        try:
            return self._bindings.nixlAgent(self.name, config)
        except Exception as error:
            raise UnavailableError(f"NIXL makes no agent here: {type(error).__name__}: {error}") from error

    def _start_backend(self, backend: str, given: Mapping[str, str]) -> int:
        available = sorted(self._agent.getAvailPlugins())
        if backend not in available:
            raise UnavailableError(
                f"NIXL ({self.module.path}) has no backend {backend!r}; it has {', '.join(available)}"
            )
        try:
            with without_exit_crash(self.module):
                handle: int = self._agent.createBackend(backend, dict(given))
        except Exception as error:
            raise _errors.backend_error(error, backend) from error
        return handle

    def _check_reach(self) -> None:
        try:
            self._agent.getLocalMD()
        except Exception as error:
            names = ", ".join(self._backends)
            raise ConfigError(
                f"of backends={names} none reaches another agent: add one that does, such as UCX"
            ) from error

    def _backends_for(self, kind: MemoryKind) -> list[int]:
        segment = self._segments[kind].name
        return [handle for handle in self._backends.values() if segment in self._agent.getBackendParams(handle)[1]]

    # -- memory and peers -------------------------------------------------------------------------------------------

    def _register(self, memory: Memory) -> tuple[int, Any]:
        try:
            region = (memory.address, memory.nbytes, memory.device_id, "")
            regions = self._bindings.nixlRegDList(self._segments[memory.kind], [region])
            self._agent.registerMem(regions, self._backends_of[memory.kind])
        except Exception as error:
            raise _errors.registration_error(error, f"register {memory}") from error
        self._registrations_made += 1
        self._registered[self._registrations_made] = regions
        return self._registrations_made, regions

    def _deregister(self, registration: Any, memory: Memory) -> None:
        number, regions = registration
        try:
            self._agent.deregisterMem(regions, self._backends_of[memory.kind])
        except Exception as error:
            raise _errors.registration_error(error, f"deregister {memory}") from error
        del self._registered[number]

    def _describe(self) -> bytes:
        return msgspec.msgpack.encode(
            NixlDescription(self._agent.getLocalMD(), self._surroundings, list(self._registered))
        )

    def _connect(self, name: str, native: bytes) -> NixlPeer:
        try:
            described = msgspec.msgpack.decode(native, type=NixlDescription)
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            raise PeerInfoError(f"cannot read the NIXL part of the description of {name!r}: {error}") from error
        self._check_metadata(name, described.metadata)
        registered = frozenset(described.registered)
        known: NixlPeer | None = self._peers[name].native if name in self._peers else None
        if known is not None and not known.registered <= registered:
            # NIXL only adds regions: it would go on using the keys of a region that was replaced at the same address.
            self._forget(name)
        try:
            answered = self._agent.loadRemoteMD(described.metadata)
        except Exception as error:
            raise _errors.peer_error(error, name) from error
        if answered.decode(errors="replace") != name:
            if answered.decode(errors="replace") not in self._peers:
                self._forget(answered)
            raise PeerInfoError(f"the description of {name!r} contains NIXL's metadata of {answered!r}")
        if known is not None:
            known.registered = registered
            return known
        return NixlPeer(name, registered, LinkWatch(predict(self._surroundings, described.surroundings)))

    def _check_metadata(self, name: str, metadata: bytes) -> None:
        """Refuse metadata with a malformed frame, or of another agent than ``name``, before NIXL reads it. Raises PeerInfoError."""
        if not self._knows_frame:
            return
        try:
            found = agent_name(metadata)
        except ValueError as error:
            raise PeerInfoError(f"the description of {name!r} contains malformed NIXL metadata: {error}") from error
        if found != name:
            raise PeerInfoError(f"the description of {name!r} contains NIXL's metadata of {found!r}")

    def _reads_own_frame(self) -> bool:
        """Whether this NIXL writes metadata in the frame that is known here; another version may write another one."""
        try:
            return agent_name(self._agent.getLocalMD()) == self.name
        except ValueError as error:
            _log.warning(
                "NIXL %s writes its metadata in another way than 1.5 (%s): what peers send is not checked before NIXL reads it",
                self.module.version,
                error,
            )
            return False

    def _disconnect(self, peer: Any) -> None:
        self._forget(peer.name)
        peer.forgotten = True
        self.connection_cycles += 1
        if self.connection_cycles % RECYCLE_AFTER_CYCLES == 0:
            _log.warning("%s has disconnected %d peers; each left a file descriptor open on either side until the agent is "
                         "closed: consider a new agent", self.name, self.connection_cycles)  # fmt: skip

    def _forget(self, name: str | bytes) -> None:
        try:
            self._agent.invalidateRemoteMD(name)
        except Exception:  # noqa: BLE001 - NIXL has forgotten what is unknown or dead
            _log.debug("NIXL does not forget %r", name, exc_info=True)

    def _warn_of_shared_fate(self, op: Op, peer: NixlPeer) -> None:
        """Warn of the first READ from a peer over TCP. A WRITE ties no fates."""
        if op is Op.READ and peer.watch.link.fate_shared and not peer.warned:
            peer.warned = True
            _log.warning("fate-shared link: %s reads from %s over TCP, where a process that ends during its READ may abort the "
                         "process that it reads from (UCX); a WRITE does not", self.name, peer.name)  # fmt: skip

    # -- transfers --------------------------------------------------------------------------------------------------

    def _submit(self, op: Op, peer: Any, spans: Descriptors, local: Memory, remote: Memory) -> XferRequest:
        # No local variable refers to the C++ agent: the traceback of an exception would keep its frame and so the agent alive,
        # and close() would end nothing (see _close).
        bindings = self._bindings
        try:
            handle = self._agent.createXferReq(
                bindings.NIXL_READ if op is Op.READ else bindings.NIXL_WRITE,
                self._spans(local, spans.local, spans.nbytes),
                self._spans(remote, spans.remote, spans.nbytes),
                peer.name,
                "",
                [],
            )
        except Exception as error:
            raise _errors.preparation_error(error, peer.name) from error
        transfer = XferRequest(handle, peer, op)
        self._unfinished[handle] = transfer
        try:
            status = self._agent.postXferReq(handle, "")
        except Exception as error:
            transfer.broken = True
            raise _errors.transfer_error(error, peer.name) from error
        transfer.complete = status == bindings.NIXL_SUCCESS
        peer.watch.posted(op, spans.total_nbytes, inline=transfer.complete)
        self._warn_of_shared_fate(op, peer)
        return transfer

    def _spans(self, memory: Memory, addresses: Any, nbytes: Any) -> Any:
        if len(nbytes) == 1:  # as each check of a lease: a tuple is cheaper than an array
            return self._bindings.nixlXferDList(
                self._segments[memory.kind], [(int(addresses[0]), int(nbytes[0]), memory.device_id)]
            )
        table = np.empty((len(nbytes), 3), dtype=np.uint64)
        table[:, 0], table[:, 1], table[:, 2] = addresses, nbytes, memory.device_id
        return self._bindings.nixlXferDList(self._segments[memory.kind], table)

    def _poll(self, handle: Any) -> bool:
        if not handle.complete:
            try:
                status = self._agent.getXferStatus(handle.handle)
            except Exception as error:
                # NIXL no longer answers about a peer that was forgotten, but the transfer may still be running.
                handle.broken = not handle.peer.forgotten
                raise _errors.transfer_error(error, handle.peer.name) from error
            if status == self._bindings.NIXL_IN_PROG:
                return False
            handle.complete = True
        handle.peer.watch.completed()
        return True

    def _release(self, handle: Any) -> None:
        # An incomplete request stays until the agent ends: releasing it stops nothing, and unmaps memory that a copy may still
        # use, which crashes this process (seen with TCP).
        if handle.complete:
            self._unfinished.pop(handle.handle, None)
            self._agent.releaseXferReq(handle.handle)

    def _close(self) -> None:
        self._drain()
        # The end of the C++ agent joins its progress thread and destroys UCX's workers: nothing moves after that. This is the
        # only reference to the agent (requests know numbers, not objects), so it ends here.
        self._agent = None
        self._unfinished.clear()
        self._registered.clear()

    def _drain(self) -> None:
        """Wait for reads over TCP: ending them could crash the process that they read from."""
        deadline = time.monotonic() + self._drain_s
        while time.monotonic() < deadline:
            running = [t for t in self._unfinished.values() if t.op is Op.READ and t.peer.watch.link.fate_shared]
            if all(self._ended(transfer) for transfer in running):
                return
            time.sleep(_DRAIN_POLL_S)
        _log.warning(
            "%s closes with reads over TCP in flight; the processes that they read from may not survive it", self.name
        )

    def _ended(self, transfer: XferRequest) -> bool:
        if transfer.complete or transfer.broken:
            return True
        try:
            return self._poll(transfer)
        except TransferError:
            return transfer.broken
