# SPDX-License-Identifier: Apache-2.0
"""The life of an endpoint's transfer agent: made with all memory registered, met with peers, torn down, made again.

All of it on the data thread, which owns the agent. Closing an agent is the one thing that stops every engine we know from
writing, so an agent has a successor whenever something had to be stopped; peers are told how that one is reached.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from kvxfer.agents.capabilities import Op
from kvxfer.defects import Defects

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvxfer.agents.base import TransferAgent
    from kvxfer.agents.description import AgentPeer
    from kvxfer.memory.spans import Memory
    from kvxfer.metrics import Metrics

_log = logging.getLogger(__name__)

REMAKE_EVERY_S = 1.0
"""How long to wait before an agent that could not be made is tried again."""


class AgentLifecycle:
    """The transfer agent of an endpoint, and its successors.

    Args:
        make_agent: each agent has another name.
        memories: registered with every agent, and outlive them all.
        replaced: called with the description of an agent that took the place of another one: what peers know of that is
            of no use any more.
        now: the clock.
    """

    def __init__(
        self,
        make_agent: Callable[[], TransferAgent],
        memories: Sequence[Memory],
        metrics: Metrics,
        replaced: Callable[[bytes], object],
        now: Callable[[], float],
    ) -> None:
        self._now = now
        self._make_agent = make_agent
        self._memories = memories
        self._defects = Defects(metrics, "data")
        self._replaced = replaced
        self.agent: TransferAgent | None = None
        """The agent; None before `first`, and after `close` until it is made again."""
        self.proven: dict[tuple[Op, bytes], float] = {}
        """Descriptions of the peers from which this agent has read something, or who have written something to it: since when."""
        self.parting: set[bytes] = set()
        """Descriptions of peers to be forgotten once more."""
        self._peers: dict[bytes, AgentPeer] = {}
        self._remake_at = float("-inf")

    @property
    def peers(self) -> int:
        """Peers that the agent was introduced to, and those that are to be forgotten once more."""
        return len(self._peers) + len(self.parting)

    def first(self) -> tuple[str, bytes]:
        """Make the first agent; its adapter's name, and how peers reach it.

        Raises:
            KvxferError: it cannot be made, or refuses the memory.
        """
        agent = self._new()
        return agent.adapter, agent.describe()

    def ensure(self) -> TransferAgent:
        """The agent, made again if there is none. Raises KvxferError as `first`."""
        if self.agent is not None:
            return self.agent
        agent = self._new()
        try:
            self._replaced(agent.describe())
        except BaseException:
            self.close()
            raise
        return agent

    def remake(self) -> None:
        """Try to have an agent again, not more often than each ``REMAKE_EVERY_S``."""
        if self._now() < self._remake_at:
            return
        try:
            self.ensure()
        except Exception:  # noqa: BLE001 - logged with its trace
            # A read tries again at once, and fails by name if it still cannot be made.
            _log.exception("the transfer agent cannot be made again; next try in %g s", REMAKE_EVERY_S)
            self._remake_at = self._now() + REMAKE_EVERY_S

    def peer(self, agent_info: bytes) -> AgentPeer:
        """The peer of this description, met if it was not. Raises KvxferError: it cannot be met, or there is no agent."""
        agent = self.ensure()
        peer = self._peers.get(agent_info)
        if peer is None or not peer.connected:
            peer = self._peers[agent_info] = agent.connect(agent_info)
        return peer

    def explain(self, agent_info: bytes) -> tuple[str, str]:
        """Transport from a peer, for people, and the kind of the link in one word; empty if the peer was not met."""
        peer = self._peers.get(agent_info)
        if self.agent is None or peer is None:
            return "", ""
        try:
            return str(self.agent.explain(peer)), str(self.agent.link_kind(peer))
        except Exception:  # noqa: BLE001 - a vendor's; no read fails for want of words
            _log.debug("the transfer agent cannot explain how it reaches %r", peer.name, exc_info=True)
            return "", ""

    def forget(self, agent_info: bytes, *, needed: bool = False) -> None:
        """The peer of this description is gone for good.

        Args:
            agent_info: see `peer`.
            needed: by a read that may still ask for it: then it is met again, and kept in `parting` until it is needed no more.
        """
        if needed:
            self.parting.add(agent_info)
        else:
            self.parting.discard(agent_info)
        for op in Op:
            self.proven.pop((op, agent_info), None)
        peer = self._peers.pop(agent_info, None)
        if peer is not None and self.agent is not None and peer.connected:
            try:
                self.agent.disconnect(peer)
            except Exception as error:  # noqa: BLE001 - a vendor's; the peer is forgotten all the same
                self._defects.caught(error)

    def close(self) -> None:
        """Tear the agent down: afterwards nothing that it started writes to memory. Raises nothing."""
        agent, self.agent = self.agent, None
        self._peers.clear()
        self.proven.clear()
        if agent is None:
            return
        try:
            agent.close()
        except Exception as error:  # noqa: BLE001 - logged with its trace
            _log.error("the transfer agent raised while it was closed; its memory is taken to be quiet")
            self._defects.caught(error)

    def _new(self) -> TransferAgent:
        agent = self._make_agent()
        try:
            agent.now = self._now
            for memory in self._memories:
                agent.register(memory)
        except BaseException:
            agent.close()
            raise
        self.agent = agent
        return agent
