# SPDX-License-Identifier: Apache-2.0
"""`AgentSuite`: what every transfer agent has to pass before anybody trusts it with a cache."""

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

# No class-scoped fixture: pytest 9 wants those to be class methods, which pytest 8 does not take.
_idle: dict[type, list[ProcessPeer]] = {}


class AgentSuite(TransferTests, AgentContractTests, PeerTests, FailureTests, CostTests, ConformanceSuite):
    """Subclass it in a test module, name the adapter, and run pytest.

    The peers are threads of this process and spawned processes of this host; what reach the adapter does not declare is
    skipped, with the reason. An adapter whose agent needs options wraps them in a function of its package or test module.

    Attributes:
        make_agent: name -> agent, as a ``staticmethod``. Importable by its name: spawned processes make agents too.
        make_memory: nbytes -> `OracleMemory`, as a ``staticmethod``; for adapters that do not move DRAM.
        patience_s: how long a small transfer that is not disturbed may take at most, on a busy machine.
        deviations: see `ConformanceSuite`.
    """

    settings: ClassVar[frozenset[str]] = ConformanceSuite.settings | {"make_agent", "make_memory", "patience_s"}

    make_agent: ClassVar[Callable[[str], TransferAgent]]
    make_memory: ClassVar[Callable[[int], OracleMemory]] = staticmethod(HostSpan)
    patience_s: ClassVar[float] = 30.0

    @classmethod
    def teardown_class(cls) -> None:
        """End the processes that the tests of this class left for each other."""
        for peer in _idle.pop(cls, []):
            peer.stop()

    @pytest.fixture
    def testbed(self) -> Iterator[Testbed]:
        """Everything a test makes, taken down after it."""
        kind = type(self)
        testbed = Testbed(kind.make_agent, kind.make_memory, self.patience_s, _idle.setdefault(kind, []))
        try:
            yield testbed
        finally:
            testbed.close()
