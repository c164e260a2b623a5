# SPDX-License-Identifier: Apache-2.0
"""`AgentSuite`: the tests that every transfer agent must pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import pytest

from kvxfer.testing.agent_suite.contract import AgentContractTests
from kvxfer.testing.agent_suite.costs import CostTests
from kvxfer.testing.agent_suite.failures import FailureTests
from kvxfer.testing.agent_suite.peers import PeerTests
from kvxfer.testing.agent_suite.testbed import Testbed
from kvxfer.testing.agent_suite.transfers import TransferTests
from kvxfer.testing.conformance import ConformanceSuite
from kvxfer.testing.oracle import HostSpan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvxfer.agents.base import TransferAgent
    from kvxfer.testing.oracle import OracleMemory
    from kvxfer.testing.peers import ProcessPeer

# No class-scoped fixture: pytest 9 requires those to be class methods, which pytest 8 does not accept.
_idle: dict[type, list[ProcessPeer]] = {}


class AgentSuite(TransferTests, AgentContractTests, PeerTests, FailureTests, CostTests, ConformanceSuite):
    """Subclass it in a test module, name the adapter, and run pytest.

    The peers are threads of this process and spawned processes of this host; peers beyond the declared reach are skipped, with
    the reason. For an agent with options, use a function of the adapter's package or of the test module.

    Attributes:
        make_agent: name -> agent, as a ``staticmethod``. It must be importable by name: spawned processes call it too.
        make_memory: nbytes -> `OracleMemory`, as a ``staticmethod``; for adapters that do not move DRAM.
        patience_s: longest time that a small, undisturbed transfer may take on a busy machine.
        deviations: see `ConformanceSuite`.
    """

    settings: ClassVar[frozenset[str]] = ConformanceSuite.settings | {"make_agent", "make_memory", "patience_s"}

    make_agent: ClassVar[Callable[[str], TransferAgent]]
    make_memory: ClassVar[Callable[[int], OracleMemory]] = staticmethod(HostSpan)
    patience_s: ClassVar[float] = 30.0

    @classmethod
    def teardown_class(cls) -> None:
        """End the processes that the tests of this class reuse."""
        for peer in _idle.pop(cls, []):
            peer.stop()

    @pytest.fixture
    def testbed(self) -> Iterator[Testbed]:
        """The testbed of one test; everything made with it is closed after the test."""
        kind = type(self)
        testbed = Testbed(kind.make_agent, kind.make_memory, self.patience_s, _idle.setdefault(kind, []))
        try:
            yield testbed
        finally:
            testbed.close()
