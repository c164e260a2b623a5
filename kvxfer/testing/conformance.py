# SPDX-License-Identifier: Apache-2.0
"""Rules of both conformance suites: a subclass cannot replace a part of them, and gives a reason for each deviation."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, ClassVar

import pytest

if TYPE_CHECKING:
    from collections.abc import Mapping

KIB, MIB = 1 << 10, 1 << 20

_HOME = "kvxfer.testing."


def unique_name(label: str) -> str:
    """A name that no agent has had before."""
    return f"{label}-{uuid.uuid4().hex[:12]}"


class ConformanceSuite:
    """Base class of `AgentSuite` and `BufferSuite`.

    A subclass may set the attributes that the suite lists in ``settings``, and may add tests of its own. It cannot replace
    anything else, not even through a mix-in.

    Attributes:
        deviations: test name -> reason, for what an adapter cannot do. ``"test_x"``, or one case of it:
            ``"test_x[process-read]"``. Such a test becomes a strict xfail: once it passes, the suite fails until the entry is
            deleted.
    """

    settings: ClassVar[frozenset[str]] = frozenset({"deviations"})
    deviations: ClassVar[Mapping[str, str]] = {}

    def __init_subclass__(cls, **kwargs: object) -> None:
        """Refuse a subclass that would weaken the suite.

        Raises:
            TypeError: the subclass overrides a part of the suite, or a deviation names no test or has no reason.
        """
        super().__init_subclass__(**kwargs)
        if cls.__module__.startswith(_HOME):
            return
        ours = {name for base in cls.__mro__ if base.__module__.startswith(_HOME) for name in vars(base)}
        for name in sorted(ours - cls.settings):
            if name.startswith("__"):
                continue
            first = next(base for base in cls.__mro__ if name in vars(base))
            if not first.__module__.startswith(_HOME):
                raise TypeError(f"{first.__name__}.{name} replaces a part of the suite; declare a deviation instead")
        for name, reason in cls.deviations.items():
            if name.partition("[")[0] not in ours or not name.startswith("test_"):
                raise TypeError(f"{cls.__name__}.deviations names {name!r}, which is no test of this suite")
            if not str(reason).strip():
                raise TypeError(f"{cls.__name__}.deviations[{name!r}] needs a reason")

    @pytest.fixture(autouse=True)
    def _expect_declared_deviations(self, request: pytest.FixtureRequest) -> None:
        names = (request.node.name, getattr(request.node, "originalname", request.node.name))
        for name in names:
            if name in self.deviations:
                request.applymarker(pytest.mark.xfail(reason=self.deviations[name], strict=True))
