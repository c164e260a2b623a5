# SPDX-License-Identifier: Apache-2.0
"""What the conformance suites share: nobody hollows them out by accident, and deviations are declared, with a reason."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import pytest

if TYPE_CHECKING:
    from collections.abc import Mapping

_HOME = "kvxfer.testing."


class Suite:
    """Base of `AgentSuite` and `BufferSuite`.

    A subclass may set what the suite lists in ``settings`` and add tests of its own; it cannot replace anything else, also
    not through a mix-in.

    Attributes:
        deviations: test name -> reason, for what an adapter cannot do. ``"test_x"`` or one case of it,
            ``"test_x[process-read]"``. Such a test becomes a strict xfail: the day it passes, the suite fails, and the
            line is to be deleted.
    """

    settings: ClassVar[frozenset[str]] = frozenset({"deviations"})
    deviations: ClassVar[Mapping[str, str]] = {}

    def __init_subclass__(cls, **kwargs: object) -> None:
        """Refuse what would weaken the suite.

        Raises:
            TypeError: a part of the suite is overridden, or a deviation names no test or has no reason.
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
